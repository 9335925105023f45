#pragma once
// Random numbers that are the same with every standard library: its engines are specified, its
// distributions are not.
//
// Thread-safety: none.

#include <cmath>
#include <cstdint>
#include <random>

namespace spindle::coordinator::simulation {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
constexpr std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

class SeededRandom {
 public:
  explicit SeededRandom(std::uint64_t seed) : engine_(mix(seed)) {}

  // In [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  int index(std::size_t n) { return static_cast<int>(engine_() % n); }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }
  // In [0, 1).
  double unit() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double between_real(double low, double high) { return low + (high - low) * unit(); }
  double exponential(double mean) { return -mean * std::log1p(-unit()); }
  // Box and Muller.
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log1p(-unit()));
    return radius * std::cos(6.283185307179586 * unit());
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace spindle::coordinator::simulation
