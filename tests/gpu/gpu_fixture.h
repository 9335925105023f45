#pragma once
// What tests of CUDA bodies share: a context or a skip with its reason, seeded random data (the
// seed is printed on failure), device copies of vectors with guard bytes behind them, and
// comparisons that refuse NaN.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/cuda_context.h"
#include "kernels/core/dtype.h"
#include "kernels/cuda/devices.h"

namespace spindle::testing {

// A vector on the device, with poisoned guard bytes behind it that check_guard() compares.
template <typename T>
class DeviceVector {
 public:
  static constexpr std::size_t kGuardBytes = 256;

  DeviceVector(const CudaContext& context, std::size_t n) : context_(&context), n_(n) {
    auto buffer = context.allocate(n * sizeof(T) + kGuardBytes, "a test's vector");
    if (!buffer.ok()) throw std::runtime_error(buffer.status().to_string());
    buffer_ = std::move(*buffer);
    context.fill(buffer_.data(), 0xab, buffer_.n_bytes());  // also poisons the content
  }
  DeviceVector(const CudaContext& context, std::span<const T> values)
      : DeviceVector(context, values.size()) {
    context.to_device(buffer_.data(), values.data(), values.size_bytes());
  }
  DeviceVector(const CudaContext& context, const std::vector<T>& values)
      : DeviceVector(context, std::span<const T>(values)) {}

  T* data() const { return buffer_.as<T>(); }
  std::size_t size() const { return n_; }
  std::vector<T> to_host() const {
    std::vector<T> values(n_);
    context_->to_host(values.data(), buffer_.data(), n_ * sizeof(T));
    context_->synchronize();
    check_guard();
    return values;
  }
  void check_guard() const {
    std::vector<std::uint8_t> guard(kGuardBytes);
    context_->to_host(guard.data(), buffer_.data() + n_ * sizeof(T), kGuardBytes);
    context_->synchronize();
    for (std::size_t i = 0; i < kGuardBytes; ++i) {
      ASSERT_EQ(guard[i], 0xab) << "written " << i << " bytes past the end of a vector";
    }
  }

 private:
  const CudaContext* context_;
  std::size_t n_;
  DeviceBuffer buffer_;
};

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto devices = kernels::list_cuda_devices();
    ASSERT_TRUE(devices.ok()) << devices.status().to_string();
    if (devices->empty()) GTEST_SKIP() << "no CUDA device on this machine";
    auto context = CudaContext::create(0);
    ASSERT_TRUE(context.ok()) << context.status().to_string();
    context_ = std::move(*context);
    RecordProperty("seed", std::to_string(seed_));
  }
  void TearDown() override {
    if (HasFailure()) std::fprintf(stderr, "seed %u\n", seed_);
  }

  const CudaContext& gpu() const { return *context_; }
  std::mt19937& random() { return random_; }
  std::uint32_t seed() const { return seed_; }
  std::vector<float> normal(std::size_t n, float scale = 1.0F) {
    std::normal_distribution<float> distribution(0.0F, scale);
    std::vector<float> values(n);
    for (float& value : values) value = distribution(random_);
    return values;
  }
  int uniform_int(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random_);
  }
  template <typename T>
  DeviceVector<T> upload(const std::vector<T>& values) const {
    return DeviceVector<T>(gpu(), values);
  }
  template <typename T>
  DeviceVector<T> device(std::size_t n) const {
    return DeviceVector<T>(gpu(), n);
  }

 private:
  std::unique_ptr<CudaContext> context_;
  std::uint32_t seed_ = std::random_device{}();
  std::mt19937 random_{seed_};
};

inline std::vector<Bf16> to_bf16(std::span<const float> values) {
  std::vector<Bf16> out;
  for (const float value : values) out.push_back({f32_to_bf16(value)});
  return out;
}
inline std::vector<F16> to_f16(std::span<const float> values) {
  std::vector<F16> out;
  for (const float value : values) out.push_back({f32_to_f16(value)});
  return out;
}
inline std::vector<float> widened(const std::vector<Bf16>& values) {
  std::vector<float> out;
  for (const Bf16 value : values) out.push_back(bf16_to_f32(value.bits));
  return out;
}
inline std::vector<float> widened(const std::vector<F16>& values) {
  std::vector<float> out;
  for (const F16 value : values) out.push_back(f16_to_f32(value.bits));
  return out;
}

// |a - b| <= absolute + relative * |b| everywhere; NaN or infinity never passes.
inline void expect_close(std::span<const float> actual, std::span<const float> expected,
                         float absolute, float relative, const std::string& what = "") {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_TRUE(std::isfinite(actual[i])) << what << " at " << i << ": " << actual[i];
    ASSERT_LE(std::fabs(actual[i] - expected[i]), absolute + relative * std::fabs(expected[i]))
        << what << " at " << i << ": " << actual[i] << " instead of " << expected[i];
  }
}

// ||actual - expected|| / ||expected||.
inline double relative_error(std::span<const float> actual, std::span<const float> expected) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < actual.size() && i < expected.size(); ++i) {
    const double d = static_cast<double>(actual[i]) - expected[i];
    difference += d * d;
    norm += static_cast<double>(expected[i]) * expected[i];
  }
  if (actual.size() != expected.size() || !std::isfinite(difference)) return HUGE_VAL;
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

}  // namespace spindle::testing
