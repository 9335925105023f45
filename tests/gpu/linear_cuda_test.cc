#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "kernels/core/cuda_check.h"
#include "kernels/cuda/device_linear.h"
#include "kernels/cuda/skinny_linear.h"
#include "kernels/linear.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kRowCounts[] = {0, 1, 2, 3, 5, 8, 9, 16, 33, 100, 512};

struct Shape {
  std::int64_t n_out = 0;
  std::int64_t n_in = 0;
};
// Less than a tile, odd outputs, columns that are no multiple of a step, more tiles than blocks.
constexpr Shape kShapes[] = {{5, 8}, {64, 768}, {257, 136}, {300, 520}, {6000, 264}};

// Sums are fp32 in an order of the library's own, at worst truncated at each addition; this bounds
// them for up to some thousand terms. bf16 results are rounded by half a step of 2^-7.
constexpr double kSumError = 4e-6;
constexpr double kBf16Error = 1.0 / 256;

class LinearCudaTest : public testing::GpuTest {
 protected:
  struct Weight {
    Shape shape;
    std::vector<float> values;  // of the bf16 weights
    DeviceLinear device;
  };

  Weight weight(Shape shape) {
    const auto n = static_cast<std::size_t>(shape.n_out * shape.n_in);
    const std::vector<Bf16> host =
        testing::to_bf16(normal(n, 1.0F / std::sqrt(static_cast<float>(shape.n_in))));
    const WeightSource source{host.data(), DType::kBF16, shape.n_out};
    auto device = DeviceLinear::upload(gpu(), std::span(&source, 1), shape.n_in);
    EXPECT_TRUE(device.ok()) << device.status().to_string();
    return {shape, testing::widened(host), std::move(*device)};
  }

  // Rows of x with `gap` values between them; gaps hold NaN.
  struct Input {
    std::int64_t stride = 0;
    std::vector<float> values;  // with gaps
    testing::DeviceVector<Bf16> device;
    ConstBf16Rows rows;
  };
  Input input(std::int64_t n_rows, std::int64_t width, std::int64_t gap) {
    const std::int64_t stride = width + gap;
    std::vector<Bf16> host = testing::to_bf16(normal(static_cast<std::size_t>(n_rows * stride)));
    for (std::int64_t i = 0; i < n_rows * stride; ++i) {
      if (i % stride >= width) host[static_cast<std::size_t>(i)].bits = 0x7fc0;
    }
    Input out{stride, testing::widened(host), upload(host), {}};
    out.rows = ConstBf16Rows(out.device.data(), n_rows, width, stride);
    return out;
  }

  // One exact output, and the sum of its terms' sizes.
  struct Exact {
    double value = 0;
    double size = 0;
  };
  static Exact exact(const Weight& weight, const Input& x, std::int64_t row, std::int64_t output) {
    Exact out;
    for (std::int64_t k = 0; k < weight.shape.n_in; ++k) {
      const double term =
          static_cast<double>(x.values[static_cast<std::size_t>(row * x.stride + k)]) *
          static_cast<double>(
              weight.values[static_cast<std::size_t>(output * weight.shape.n_in + k)]);
      out.value += term;
      out.size += std::fabs(term);
    }
    return out;
  }

  static void expect_near(double actual, double expected, double tolerance, std::int64_t row,
                          std::int64_t output) {
    ASSERT_TRUE(std::isfinite(actual)) << "row " << row << " output " << output;
    ASSERT_LE(std::fabs(actual - expected), tolerance)
        << "row " << row << " output " << output << ": " << actual << " instead of " << expected;
  }

  // All forms of the product on `n_rows` rows, with gaps between the rows of x and y.
  void check_product(const Weight& weight, std::int64_t n_rows, std::int64_t x_gap,
                     std::int64_t y_gap) {
    const Shape shape = weight.shape;
    SCOPED_TRACE(::testing::Message() << shape.n_out << " x " << shape.n_in << ", " << n_rows
                                      << " rows, gaps " << x_gap << " and " << y_gap);
    const Input x = input(n_rows, shape.n_in, x_gap);
    const std::int64_t stride = shape.n_out + y_gap;
    const auto n = static_cast<std::size_t>(n_rows * stride);
    const std::vector<float> before = normal(n);
    const auto y16 = upload(testing::to_bf16(before));
    const auto y32 = upload(before);
    const auto sum = upload(before);
    linear(gpu(), weight.device, x.rows, Bf16Rows(y16.data(), n_rows, shape.n_out, stride));
    linear(gpu(), weight.device, x.rows, Rows(y32.data(), n_rows, shape.n_out, stride));
    linear_add(gpu(), weight.device, x.rows, Rows(sum.data(), n_rows, shape.n_out, stride));
    const std::vector<float> got16 = testing::widened(y16.to_host());
    const std::vector<float> got32 = y32.to_host();
    const std::vector<float> got_sum = sum.to_host();
    // All of few rows; of many a sample, since the oracle is slow.
    const std::int64_t every = n_rows * shape.n_out * shape.n_in > 40'000'000 ? 7 : 1;
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(n); ++i) {
      const auto at = static_cast<std::size_t>(i);
      const std::int64_t row = i / stride;
      const std::int64_t output = i % stride;
      if (output >= shape.n_out) {
        ASSERT_EQ(got32[at], before[at]) << "written between rows";
        ASSERT_EQ(got_sum[at], before[at]) << "written between rows";
        ASSERT_EQ(got16[at], bf16_to_f32(f32_to_bf16(before[at]))) << "written between rows";
        continue;
      }
      if (i % every != 0) continue;
      const Exact e = exact(weight, x, row, output);
      const double error = kSumError * e.size;
      expect_near(got16[at], e.value, error + kBf16Error * (std::fabs(e.value) + error), row,
                  output);
      expect_near(got32[at], e.value, error, row, output);
      const double total = e.value + static_cast<double>(before[at]);
      expect_near(got_sum[at], total, error + 2e-7 * (std::fabs(total) + 1.0), row, output);
    }
    if (shape.n_out % 2 == 0) check_swiglu(weight, x, n_rows, y_gap);
  }

  void check_swiglu(const Weight& weight, const Input& x, std::int64_t n_rows, std::int64_t gap) {
    const std::int64_t inter = weight.shape.n_out / 2;
    const std::int64_t stride = inter + gap;
    const auto scratch = device<float>(static_cast<std::size_t>(n_rows * 2 * inter));
    const auto out = device<Bf16>(static_cast<std::size_t>(n_rows * stride));
    linear_swiglu(gpu(), weight.device, x.rows, Rows(scratch.data(), n_rows, 2 * inter),
                  Bf16Rows(out.data(), n_rows, inter, stride));
    scratch.check_guard();
    check_gated(weight, x, n_rows, stride, testing::widened(out.to_host()));
  }

  static void check_gated(const Weight& weight, const Input& x, std::int64_t n_rows,
                          std::int64_t stride, const std::vector<float>& got) {
    const std::int64_t inter = weight.shape.n_out / 2;
    const std::int64_t every = n_rows * 2 * inter * weight.shape.n_in > 40'000'000 ? 7 : 1;
    for (std::int64_t i = 0; i < n_rows * inter; i += every) {
      const std::int64_t row = i / inter;
      const std::int64_t output = i % inter;
      const Exact gate = exact(weight, x, row, output);
      const Exact up = exact(weight, x, row, output + inter);
      const double expected = gate.value / (1.0 + std::exp(-gate.value)) * up.value;
      const double sums =
          kSumError * (gate.size * std::fabs(up.value) * 1.2 + up.size * std::fabs(gate.value));
      expect_near(got[static_cast<std::size_t>(row * stride + output)], expected,
                  1.01 * kBf16Error * std::fabs(expected) + sums + 1e-6, row, output);
    }
  }
};

TEST_F(LinearCudaTest, EqualsTheExactProductForAnyNumberOfRows) {
  for (const Shape shape : kShapes) {
    const Weight w = weight(shape);
    for (const std::int64_t n_rows : kRowCounts) {
      if (n_rows > 100 && shape.n_out > 1000) continue;
      check_product(w, n_rows, 0, 0);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(LinearCudaTest, RowsMayLieApart) {
  const Weight w = weight({300, 520});
  for (const std::int64_t n_rows : kRowCounts) {
    check_product(w, n_rows, 24, 8);  // aligned
    if (HasFatalFailure()) return;
    check_product(w, n_rows, 8, 3);  // y at any place
    if (HasFatalFailure()) return;
  }
}

TEST_F(LinearCudaTest, TunedProductsAreTheSame) {
  for (const Shape shape : {Shape{300, 520}, Shape{257, 136}}) {
    Weight w = weight(shape);
    const Status status = tune_linear(gpu(), w.device, 100);
    ASSERT_TRUE(status.ok()) << status.to_string();
    Weight other = weight(shape);
    other.device.copy_tuning(w.device);
    for (const std::int64_t n_rows : kRowCounts) {
      check_product(w, n_rows, 0, 0);
      if (HasFatalFailure()) return;
      check_product(other, n_rows, 8, 3);
      if (HasFatalFailure()) return;
    }
    EXPECT_FALSE(w.device.choice(gpu(), kLinearAdd, 33).empty());
  }
}

TEST_F(LinearCudaTest, EveryShapeOfTheSkinnyKernelIsExact) {
  std::vector<Shape> shapes(std::begin(kShapes), std::end(kShapes));
  // Several phases of columns with x in registers; tiles in pairs, the last one alone.
  shapes.insert(shapes.end(), {{24, 9000}, {16 * (2 * gpu().n_multiprocessors() + 3), 4168}});
  for (const Shape shape : shapes) {
    const Weight w = weight(shape);
    for (int variant = 0; variant < kSkinnyVariants; ++variant) {
      for (const int n_rows : {1, 4, 7, 8, 9, 15, 16}) {
        if (!skinny_fits(gpu(), variant, n_rows)) continue;
        // What is expected is computed on the host.
        if (shape.n_out > 1000 && shape.n_in > 1000 && variant != kResidentVariant) continue;
        SCOPED_TRACE(::testing::Message() << skinny_name(variant) << ", " << shape.n_out << " x "
                                          << shape.n_in << ", " << n_rows << " rows");
        const Input x = input(n_rows, shape.n_in, 8);
        const auto y = device<float>(static_cast<std::size_t>(n_rows * shape.n_out));
        skinny_linear(gpu(), LinearOutput::kF32, variant,
                      {w.device.data(), shape.n_out, shape.n_in, x.rows.data, x.stride, n_rows,
                       y.data(), shape.n_out});
        const std::vector<float> got = y.to_host();
        for (std::size_t i = 0; i < got.size(); ++i) {
          const auto row = static_cast<std::int64_t>(i) / shape.n_out;
          const auto output = static_cast<std::int64_t>(i) % shape.n_out;
          const Exact e = exact(w, x, row, output);
          expect_near(got[i], e.value, kSumError * e.size, row, output);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_F(LinearCudaTest, GatedProductsInParts) {
  const Weight w = weight({640, 520});
  const std::int64_t inter = 320;
  const auto& body = DeviceLinearAccess::body(w.device);
  for (const std::int64_t n_rows : {16, 100, 300}) {
    for (const int parts : {2, 4, 8}) {
      SCOPED_TRACE(::testing::Message() << n_rows << " rows, " << parts << " parts");
      const Input x = input(n_rows, 520, 8);
      const auto scratch = device<float>(static_cast<std::size_t>(n_rows * 640));
      const auto out = device<Bf16>(static_cast<std::size_t>(n_rows * (inter + 8)));
      LinearCall call;
      call.x = x.rows.data;
      call.x_stride = x.stride;
      call.n_rows = n_rows;
      call.y = scratch.data();
      call.y_stride = 640;
      call.swiglu = out.data();
      call.swiglu_stride = inter + 8;
      BlasProduct product = BlasProduct::gated_part(640, 520, call, parts);
      const auto algorithms = product.algorithms(gpu(), 3);
      ASSERT_FALSE(algorithms.empty());
      for (const cublasLtMatmulAlgo_t& algorithm : algorithms) {
        ASSERT_TRUE(DeviceLinearAccess::run_choice(gpu(), body, w.device.data(),
                                                   LinearOutput::kSwiglu, call,
                                                   {-1, product.y_alignment(), algorithm, parts}));
        check_gated(w, x, n_rows, inter + 8, testing::widened(out.to_host()));
        if (HasFatalFailure()) return;
      }
      scratch.check_guard();
    }
  }
}

// Dependent launches start early: each must still see what the one before wrote.
TEST_F(LinearCudaTest, AChainOfProductsGivesTheSameBitsEveryTime) {
  const Weight up = weight({4096, 1024});
  const Weight down = weight({1024, 4096});
  const Input x = input(1, 1024, 0);
  const auto middle = device<Bf16>(4096);
  const auto out = device<Bf16>(1024);
  const auto last = device<float>(4096);
  std::vector<float> first;
  for (int run = 0; run < 20; ++run) {
    gpu().copy(out.data(), x.device.data(), 1024 * sizeof(Bf16));
    for (int i = 0; i < 10; ++i) {
      linear(gpu(), up.device, ConstBf16Rows(out.data(), 1, 1024),
             Bf16Rows(middle.data(), 1, 4096));
      linear(gpu(), down.device, ConstBf16Rows(middle.data(), 1, 4096),
             Bf16Rows(out.data(), 1, 1024));
    }
    linear(gpu(), up.device, ConstBf16Rows(out.data(), 1, 1024), Rows(last.data(), 1, 4096));
    const std::vector<float> got = last.to_host();
    if (run == 0) first = got;
    ASSERT_EQ(got, first) << "run " << run;
  }
  ASSERT_TRUE(std::isfinite(first[0]));
}

TEST_F(LinearCudaTest, CanBeCapturedInAGraph) {
  Weight w = weight({320, 512});
  ASSERT_TRUE(tune_linear(gpu(), w.device, 64, kLinearBf16).ok());
  for (const std::int64_t n_rows : {1, 8, 40}) {
    const Input x = input(n_rows, 512, 0);
    const auto eager = device<Bf16>(static_cast<std::size_t>(n_rows * 320));
    const auto replayed = device<Bf16>(static_cast<std::size_t>(n_rows * 320));
    linear(gpu(), w.device, x.rows, Bf16Rows(eager.data(), n_rows, 320));
    gpu().synchronize();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cuda_check(cudaStreamBeginCapture(gpu().stream(), cudaStreamCaptureModeThreadLocal));
    linear(gpu(), w.device, x.rows, Bf16Rows(replayed.data(), n_rows, 320));
    linear(gpu(), w.device, x.rows, Bf16Rows(replayed.data(), n_rows, 320));
    cuda_check(cudaStreamEndCapture(gpu().stream(), &graph));
    cuda_check(cudaGraphInstantiate(&executable, graph, 0));
    for (int i = 0; i < 3; ++i) cuda_check(cudaGraphLaunch(executable, gpu().stream()));
    EXPECT_EQ(testing::widened(replayed.to_host()), testing::widened(eager.to_host()));
    cuda_check(cudaGraphExecDestroy(executable));
    cuda_check(cudaGraphDestroy(graph));
  }
}

TEST_F(LinearCudaTest, UploadConcatenatesAndRoundsSources) {
  const std::int64_t n_in = 24;
  const std::vector<float> a = normal(5 * 24);
  const std::vector<F16> b = testing::to_f16(normal(3 * 24));
  const std::vector<Bf16> c = testing::to_bf16(normal(24));
  const WeightSource sources[] = {
      {a.data(), DType::kF32, 5}, {b.data(), DType::kF16, 3}, {c.data(), DType::kBF16, 1}};
  auto device = DeviceLinear::upload(gpu(), sources, n_in);
  ASSERT_TRUE(device.ok()) << device.status().to_string();
  EXPECT_EQ(device->n_out(), 9);
  EXPECT_EQ(device->n_in(), 24);
  EXPECT_EQ(device->bytes(), 9U * 24U * 2U);
  std::vector<Bf16> got(9 * 24);
  gpu().to_host(got.data(), device->data(), device->bytes());
  gpu().synchronize();
  std::vector<float> expected = a;
  for (const float value : testing::widened(b)) expected.push_back(value);
  for (const float value : testing::widened(c)) expected.push_back(value);
  EXPECT_EQ(testing::widened(got), testing::widened(testing::to_bf16(expected)));
}

TEST_F(LinearCudaTest, UploadOfMoreThanTheStagingBuffers) {
  const std::int64_t n_in = 4096;
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const std::vector<float> values = normal(3000 * 4096 + 0);
    const std::vector<Bf16> rounded = testing::to_bf16(values);
    const void* data = dtype == DType::kF32 ? static_cast<const void*>(values.data())
                                            : static_cast<const void*>(rounded.data());
    const WeightSource source{data, dtype, 3000};
    auto device = DeviceLinear::upload(gpu(), std::span(&source, 1), n_in);
    ASSERT_TRUE(device.ok()) << device.status().to_string();
    std::vector<Bf16> got(rounded.size());
    gpu().to_host(got.data(), device->data(), device->bytes());
    gpu().synchronize();
    ASSERT_EQ(std::memcmp(got.data(), rounded.data(), got.size() * sizeof(Bf16)), 0);
  }
}

TEST_F(LinearCudaTest, BadSizesAreInvalidArguments) {
  const std::vector<float> values(64);
  const auto code = [&](std::int64_t n_out, std::int64_t n_in) {
    const WeightSource source{values.data(), DType::kF32, n_out};
    return DeviceLinear::upload(gpu(), std::span(&source, 1), n_in).status();
  };
  EXPECT_EQ(code(4, 12).code(), StatusCode::kInvalidArgument);
  EXPECT_NE(code(4, 12).message().find("multiple of 8"), std::string::npos);
  EXPECT_EQ(code(0, 8).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(4, 0).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(std::int64_t{1} << 40, 8).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(DeviceLinear::upload(gpu(), {}, 8).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::kernels
