#pragma once
// What the kernel tests share: one run per instruction set the host has and per thread count,
// seeded random rows, and outputs between guard bytes.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/tensor_view.h"

namespace spindle::kernels {

inline std::unique_ptr<CpuContext> make_context(int n_threads, CpuIsa isa = CpuIsa::kAvx512) {
  return std::move(CpuContext::create({.n_threads = n_threads, .isa = isa})).value();
}

struct Backend {
  CpuIsa isa;
  int n_threads;
};

inline std::vector<Backend> all_backends() {
  std::vector<Backend> backends;
  for (const CpuIsa isa : supported_cpu_isas()) {
    for (const int n_threads : {1, 2, 3}) backends.push_back({isa, n_threads});
  }
  return backends;
}

inline std::string backend_name(const ::testing::TestParamInfo<Backend>& info) {
  return std::string(cpu_isa_name(info.param.isa)) + "_threads" +
         std::to_string(info.param.n_threads);
}

class KernelTest : public ::testing::TestWithParam<Backend> {
 protected:
  const CpuContext& context() const { return *context_; }
  // The same instruction set with another number of threads.
  std::unique_ptr<CpuContext> context_with(int n_threads) const {
    return make_context(n_threads, GetParam().isa);
  }

 private:
  std::unique_ptr<CpuContext> context_ = make_context(GetParam().n_threads, GetParam().isa);
};

// Fixed seed, printed with every failure.
class Random {
 public:
  explicit Random(std::uint64_t seed)
      : trace_(__FILE__, __LINE__, "seed " + std::to_string(seed)), engine_(seed) {}

  float normal() { return normal_(engine_); }
  std::int64_t below(std::int64_t limit) {
    return std::uniform_int_distribution<std::int64_t>(0, limit - 1)(engine_);
  }
  std::vector<float> normals(std::int64_t n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& v : values) v = normal();
    return values;
  }

 private:
  ::testing::ScopedTrace trace_;
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_{0.0F, 1.0F};
};

// An output matrix filled with NaN, `gap` unused floats after each row and a guard on both sides;
// check() fails when anything outside the rows changed or a result is NaN.
class GuardedRows {
 public:
  GuardedRows(std::int64_t n_rows, std::int64_t width, std::int64_t gap = 3)
      : n_rows_(n_rows),
        width_(width),
        stride_(width + gap),
        storage_(static_cast<std::size_t>(2 * kGuard + n_rows * stride_), kFill) {}

  Rows view() { return {storage_.data() + kGuard, n_rows_, width_, stride_}; }
  float at(std::int64_t row, std::int64_t column) const {
    return storage_[static_cast<std::size_t>(kGuard + row * stride_ + column)];
  }
  void check() const {
    for (std::size_t i = 0; i < storage_.size(); ++i) {
      const std::int64_t offset = static_cast<std::int64_t>(i) - kGuard;
      const bool inside = offset >= 0 && offset < n_rows_ * stride_ && offset % stride_ < width_;
      if (inside) {
        ASSERT_FALSE(std::isnan(storage_[i])) << "NaN at row " << offset / stride_;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(storage_[i]), std::bit_cast<std::uint32_t>(kFill))
            << "written outside, offset " << offset;
      }
    }
  }

 private:
  static constexpr std::int64_t kGuard = 64;
  static constexpr float kFill = std::bit_cast<float>(0x7fc5a5a5U);

  std::int64_t n_rows_;
  std::int64_t width_;
  std::int64_t stride_;
  std::vector<float> storage_;
};

inline void expect_same_bits(ConstRows a, ConstRows b) {
  ASSERT_EQ(a.n_rows, b.n_rows);
  ASSERT_EQ(a.width, b.width);
  for (std::int64_t i = 0; i < a.n_rows; ++i) {
    for (std::int64_t j = 0; j < a.width; ++j) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(a.row(i)[j]),
                std::bit_cast<std::uint32_t>(b.row(i)[j]))
          << "row " << i << " column " << j << ": " << a.row(i)[j] << " and " << b.row(i)[j];
    }
  }
}

}  // namespace spindle::kernels
