// oneDNN 2.x with an OpenMP runtime. Each thread of the context owns a slice of the outputs and
// runs its own single-threaded primitive: the OpenMP thread count is a property of the calling
// thread, and with one thread libgomp runs a parallel region inline, without starting or waking
// anybody.

#include <omp.h>

#include <algorithm>
#include <bit>
#include <dnnl.hpp>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/linear_bf16.h"

namespace spindle::kernels {
namespace {

using dnnl::memory;

// Rows of the largest primitive; more rows run in several calls.
constexpr std::int64_t kMaxRows = 512;
constexpr std::int64_t kMinRows = 16;
constexpr std::int64_t kSliceColumns = 64;

// Primitives are built for powers of two of rows; missing rows are padding.
std::int64_t row_bucket(std::int64_t n_rows) {
  const auto bucket = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(n_rows)));
  return std::clamp(bucket, kMinRows, kMaxRows);
}

// Lets oneDNN use one OpenMP thread on this thread while it lives.
class OneOpenMpThread {
 public:
  OneOpenMpThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneOpenMpThread() { omp_set_num_threads(before_); }
  OneOpenMpThread(const OneOpenMpThread&) = delete;
  OneOpenMpThread& operator=(const OneOpenMpThread&) = delete;

 private:
  int before_;
};

// Outputs [begin, end) with their weights in the layout oneDNN chose.
struct Slice {
  std::int64_t begin;
  std::int64_t end;
  memory weights;
  std::map<std::int64_t, dnnl::matmul> by_bucket;

  std::int64_t width() const { return end - begin; }
};

class OneDnnMatmul final : public Bf16Matmul {
 public:
  OneDnnMatmul(std::int64_t n_in, std::int64_t n_out)
      : engine_(dnnl::engine::kind::cpu, 0), n_in_(n_in), n_out_(n_out) {}

  void build(const CpuContext& context, std::span<const std::uint16_t> weights) {
    const OneOpenMpThread one;
    const std::int64_t n_units = (n_out_ + kSliceColumns - 1) / kSliceColumns;
    const std::int64_t n_slices = std::min<std::int64_t>(context.n_threads(), n_units);
    for (std::int64_t i = 0; i < n_slices; ++i) {
      Slice slice{};
      slice.begin = std::min(n_units * i / n_slices * kSliceColumns, n_out_);
      slice.end = std::min(n_units * (i + 1) / n_slices * kSliceColumns, n_out_);
      // The layout is the one for many rows; primitives of other buckets are asked to take it.
      const auto any = description(
          slice, kMaxRows,
          memory::desc({n_in_, slice.width()}, memory::data_type::bf16, memory::format_tag::any));
      // [n_out, n_in] row-major is [n_in, n_out] with the first dimension dense.
      memory source({{n_in_, slice.width()}, memory::data_type::bf16, memory::dims{1, n_in_}},
                    engine_, const_cast<std::uint16_t*>(weights.data() + slice.begin * n_in_));
      slice.weights = memory(any.weights_desc(), engine_);
      dnnl::stream stream(engine_);
      dnnl::reorder(source, slice.weights).execute(stream, source, slice.weights);
      stream.wait();
      slices_.push_back(std::move(slice));
    }
  }

  Status apply(const CpuContext& context, ConstRows x, Rows y) override {
    const std::lock_guard lock(mutex_);
    try {
      for (std::int64_t row = 0; row < x.n_rows; row += kMaxRows) {
        const std::int64_t n = std::min(kMaxRows, x.n_rows - row);
        apply_block(context, x.rows(row, n), y.rows(row, n));
      }
    } catch (const dnnl::error& error) {
      return internal_error(std::string("oneDNN: ") + error.what());
    }
    return ok_status();
  }

  std::size_t bytes() const override {
    std::size_t total = 0;
    for (const Slice& slice : slices_) total += slice.weights.get_desc().get_size();
    return total;
  }

 private:
  dnnl::matmul::primitive_desc description(const Slice& slice, std::int64_t rows,
                                           const memory::desc& weights) const {
    const memory::desc source({rows, n_in_}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc result({rows, slice.width()}, memory::data_type::f32,
                              memory::format_tag::ab);
    return {dnnl::matmul::desc(source, weights, result), engine_};
  }

  const dnnl::matmul& primitive(Slice& slice, std::int64_t bucket) {
    const auto found = slice.by_bucket.find(bucket);
    if (found != slice.by_bucket.end()) return found->second;
    return slice.by_bucket
        .emplace(bucket, dnnl::matmul(description(slice, bucket, slice.weights.get_desc())))
        .first->second;
  }

  void apply_block(const CpuContext& context, ConstRows x, Rows y) {
    const std::int64_t bucket = row_bucket(x.n_rows);
    source_.resize(static_cast<std::size_t>(bucket * n_in_));
    result_.resize(static_cast<std::size_t>(bucket * n_out_));
    for (std::int64_t i = 0; i < x.n_rows; ++i) {
      std::transform(x.row(i), x.row(i) + n_in_, source_.begin() + i * n_in_, f32_to_bf16);
    }
    std::fill(source_.begin() + x.n_rows * n_in_, source_.end(), std::uint16_t{0});
    {
      const OneOpenMpThread one;
      for (Slice& slice : slices_) primitive(slice, bucket);
    }
    const auto n_slices = static_cast<std::int64_t>(slices_.size());
    context.parallel_for(n_slices, 1, [&](std::int64_t begin, std::int64_t end, int) {
      const OneOpenMpThread one;
      dnnl::stream stream(engine_);
      for (std::int64_t i = begin; i < end; ++i) {
        run_slice(slices_[static_cast<std::size_t>(i)], bucket, stream, y);
      }
    });
  }

  void run_slice(Slice& slice, std::int64_t bucket, dnnl::stream& stream, Rows y) {
    float* result = result_.data() + slice.begin * bucket;  // [bucket, width] of this slice
    memory source({{bucket, n_in_}, memory::data_type::bf16, memory::format_tag::ab}, engine_,
                  source_.data());
    memory target({{bucket, slice.width()}, memory::data_type::f32, memory::format_tag::ab},
                  engine_, result);
    slice.by_bucket.at(bucket).execute(
        stream,
        {{DNNL_ARG_SRC, source}, {DNNL_ARG_WEIGHTS, slice.weights}, {DNNL_ARG_DST, target}});
    stream.wait();
    for (std::int64_t i = 0; i < y.n_rows; ++i) {
      std::copy_n(result + i * slice.width(), slice.width(), y.row(i) + slice.begin);
    }
  }

  std::mutex mutex_;
  dnnl::engine engine_;
  std::int64_t n_in_;
  std::int64_t n_out_;
  std::vector<Slice> slices_;
  std::vector<std::uint16_t> source_;  // [bucket, n_in]
  std::vector<float> result_;          // [slice][bucket, width]
};

}  // namespace

Result<std::unique_ptr<Bf16Matmul>> Bf16Matmul::create(const CpuContext& context,
                                                       std::span<const std::uint16_t> weights,
                                                       std::int64_t n_in, std::int64_t n_out) {
  try {
    auto matmul = std::make_unique<OneDnnMatmul>(n_in, n_out);
    matmul->build(context, weights);
    return std::unique_ptr<Bf16Matmul>(std::move(matmul));
  } catch (const dnnl::error& error) {
    if (error.status == dnnl_unimplemented) {
      return unimplemented(std::string("oneDNN has no bf16 matmul for this CPU: ") + error.what());
    }
    return internal_error(std::string("oneDNN: ") + error.what());
  }
}

}  // namespace spindle::kernels
