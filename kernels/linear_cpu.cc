#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"
#include "kernels/linear.h"
#include "kernels/linear_bf16.h"

namespace spindle::kernels {
namespace {

// Multiply-adds worth a second thread, about 10 us.
constexpr std::int64_t kMinWorkPerThread = 1 << 18;
// In kBF16 mode, up to this many rows go through the own kernel: a matrix unit has no use for them.
constexpr std::int64_t kMaxVectorRows = 8;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::int64_t kPackBlock = 64;

class AlignedBytes {
 public:
  AlignedBytes() = default;
  AlignedBytes(AlignedBytes&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedBytes& operator=(AlignedBytes&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~AlignedBytes() {
    if (data_ != nullptr) ::operator delete (data_, std::align_val_t{kHugePage});
  }

  bool allocate(std::size_t bytes) {
    data_ =
        static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kHugePage}, std::nothrow));
    if (data_ == nullptr) return false;
    size_ = bytes;
    // Weights are streamed; large pages spare the TLB. Refusal only costs speed.
    if (bytes >= kHugePage) static_cast<void>(madvise(data_, bytes, MADV_HUGEPAGE));
    return true;
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

ElementFormat panel_format(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return ElementFormat::kF32;
    case DType::kF16:
      return ElementFormat::kF16;
    case DType::kBF16:
      return ElementFormat::kBF16Paired;
  }
  CHECK(false, "unknown element type");
  return ElementFormat::kF32;
}

// Where column j of a panel lies in its row.
std::int64_t column_slot(ElementFormat format, std::int64_t j) {
  if (format != ElementFormat::kBF16Paired) return j;
  return j < 16 ? 2 * j : 2 * (j - 16) + 1;
}

float widen(const WeightSource& source, std::int64_t index) {
  if (source.dtype == DType::kF32) return static_cast<const float*>(source.data)[index];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(source.data)[index];
  return source.dtype == DType::kF16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

// Reads row `row` of the concatenated sources.
class Concatenation {
 public:
  explicit Concatenation(std::span<const WeightSource> sources) : sources_(sources) {}

  std::pair<const WeightSource*, std::int64_t> locate(std::int64_t row) const {
    for (const WeightSource& source : sources_) {
      if (row < source.n_out) return {&source, row};
      row -= source.n_out;
    }
    return {nullptr, 0};
  }

 private:
  std::span<const WeightSource> sources_;
};

// Fills one zeroed panel [n_in][32] with its columns.
template <typename Element, typename Read>
void pack_panel(Element* panel, ElementFormat format, std::int64_t n_in, std::int64_t n_columns,
                Read read) {
  for (std::int64_t k0 = 0; k0 < n_in; k0 += kPackBlock) {
    const std::int64_t k1 = std::min(k0 + kPackBlock, n_in);
    for (std::int64_t j = 0; j < n_columns; ++j) {
      read(j, k0, k1, panel + column_slot(format, j));
    }
    for (std::int64_t j = n_columns; j < kPanelColumns; ++j) {
      for (std::int64_t k = k0; k < k1; ++k) panel[k * kPanelColumns + column_slot(format, j)] = 0;
    }
  }
}

Status check_sources(std::span<const WeightSource> sources, std::int64_t n_in,
                     std::span<const float> bias, std::int64_t& n_out) {
  n_out = 0;
  if (sources.empty()) return invalid_argument("a linear layer needs a weight");
  if (n_in < 1 || n_in > PackedLinear::kMaxElements) {
    return invalid_argument("bad weight width " + std::to_string(n_in));
  }
  for (const WeightSource& source : sources) {
    if (source.data == nullptr || source.n_out < 1 ||
        source.n_out > PackedLinear::kMaxElements / n_in - n_out) {
      return invalid_argument("bad weight of " + std::to_string(source.n_out) + " rows of " +
                              std::to_string(n_in));
    }
    n_out += source.n_out;
  }
  if (!bias.empty() && static_cast<std::int64_t>(bias.size()) != n_out) {
    return invalid_argument("bias has " + std::to_string(bias.size()) + " values for " +
                            std::to_string(n_out) + " outputs");
  }
  return ok_status();
}

}  // namespace

struct PackedLinear::Body {
  LinearMath math = LinearMath::kF32;
  DType dtype = DType::kF32;
  std::int64_t n_in = 0;
  std::int64_t n_out = 0;
  std::int64_t n_panels = 0;
  AlignedBytes panels;  // [n_panels][n_in][32] in panel_format(dtype)
  std::vector<float> bias;
  std::unique_ptr<Bf16Matmul> bf16;

  Status pack_panels(const CpuContext& context, std::span<const WeightSource> sources);
  Status pack_bf16(const CpuContext& context, std::span<const WeightSource> sources);
  // y = x W[:, k_begin : k_begin + x.width)^T, with the bias where it is asked for.
  void run_panels(const CpuContext& context, std::int64_t k_begin, ConstRows x, Rows y,
                  bool with_bias) const;
};

Status PackedLinear::Body::pack_panels(const CpuContext& context,
                                       std::span<const WeightSource> sources) {
  const std::size_t panel_bytes =
      static_cast<std::size_t>(n_in) * kPanelColumns * dtype_bytes(dtype);
  if (!panels.allocate(panel_bytes * static_cast<std::size_t>(n_panels))) {
    return resource_exhausted("no memory for a packed weight of " +
                              std::to_string(panel_bytes * static_cast<std::size_t>(n_panels)) +
                              " bytes");
  }
  const Concatenation rows(sources);
  const ElementFormat format = panel_format(dtype);
  context.parallel_for(n_panels, 4, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t p = begin; p < end; ++p) {
      std::byte* panel = panels.data() + static_cast<std::size_t>(p) * panel_bytes;
      const std::int64_t n_columns =
          std::min<std::int64_t>(kPanelColumns, n_out - p * kPanelColumns);
      const auto read = [&](std::int64_t j, std::int64_t k0, std::int64_t k1, auto* out) {
        const auto [source, row] = rows.locate(p * kPanelColumns + j);
        const std::int64_t base = row * n_in;
        for (std::int64_t k = k0; k < k1; ++k) {
          if constexpr (sizeof(*out) == sizeof(float)) {
            out[k * kPanelColumns] = widen(*source, base + k);
          } else if (source->dtype == dtype) {
            out[k * kPanelColumns] = static_cast<const std::uint16_t*>(source->data)[base + k];
          } else {
            out[k * kPanelColumns] = f32_to_bf16(widen(*source, base + k));
          }
        }
      };
      if (dtype == DType::kF32) {
        pack_panel(reinterpret_cast<float*>(panel), format, n_in, n_columns, read);
      } else {
        pack_panel(reinterpret_cast<std::uint16_t*>(panel), format, n_in, n_columns, read);
      }
    }
  });
  return ok_status();
}

Status PackedLinear::Body::pack_bf16(const CpuContext& context,
                                     std::span<const WeightSource> sources) {
  std::vector<std::uint16_t> rows(static_cast<std::size_t>(n_in * n_out));
  auto out = rows.begin();
  for (const WeightSource& source : sources) {
    const std::int64_t n = source.n_out * n_in;
    for (std::int64_t i = 0; i < n; ++i) *out++ = f32_to_bf16(widen(source, i));
  }
  Result<std::unique_ptr<Bf16Matmul>> matmul = Bf16Matmul::create(context, rows, n_in, n_out);
  if (!matmul.ok()) return matmul.status();
  bf16 = std::move(matmul).value();
  return ok_status();
}

void PackedLinear::Body::run_panels(const CpuContext& context, std::int64_t k_begin, ConstRows x,
                                    Rows y, bool with_bias) const {
  LinearJob job{};
  job.panels =
      panels.data() + static_cast<std::size_t>(k_begin * kPanelColumns) * dtype_bytes(dtype);
  job.format = panel_format(dtype);
  job.panel_depth = n_in;
  job.n_in = x.width;
  job.n_out = n_out;
  job.bias = with_bias && !bias.empty() ? bias.data() : nullptr;
  job.round_x_to_bf16 = math == LinearMath::kBF16;
  job.x = x.data;
  job.x_stride = x.stride;
  job.n_rows = x.n_rows;
  job.y = y.data;
  job.y_stride = y.stride;

  // Few rows run several panels abreast, so threads get whole groups where there are enough.
  const std::int64_t group = n_panels >= 8 * context.n_threads() ? 4 : 1;
  const std::int64_t n_groups = (n_panels + group - 1) / group;
  const std::int64_t n_blocks = (x.n_rows + kLinearRowBlock - 1) / kLinearRowBlock;
  const std::int64_t item_work = (x.n_rows / n_blocks + 1) * x.width * kPanelColumns * group;
  const KernelTable& kernels = kernels_for(context);
  const std::size_t scratch_bytes = sizeof(float) * linear_scratch_floats(x.n_rows, x.width);
  context.parallel_for(
      n_blocks * n_groups, kMinWorkPerThread / item_work + 1,
      [&](std::int64_t begin, std::int64_t end, int thread) {
        auto* scratch = reinterpret_cast<float*>(context.scratch(thread, scratch_bytes));
        while (begin < end) {
          const std::int64_t block = begin / n_groups;
          const std::int64_t stop = std::min(end, (block + 1) * n_groups);
          kernels.linear(job, x.n_rows * block / n_blocks, x.n_rows * (block + 1) / n_blocks,
                         (begin - block * n_groups) * group,
                         std::min((stop - block * n_groups) * group, n_panels), scratch);
          begin = stop;
        }
      });
}

Result<PackedLinear> PackedLinear::pack(const CpuContext& context,
                                        std::span<const WeightSource> sources, std::int64_t n_in,
                                        LinearMath math, std::span<const float> bias) {
  auto body = std::make_unique<Body>();
  if (Status status = check_sources(sources, n_in, bias, body->n_out); !status.ok()) return status;
  const bool uniform = std::all_of(sources.begin(), sources.end(), [&](const WeightSource& s) {
    return s.dtype == sources.front().dtype;
  });
  body->math = math;
  body->n_in = n_in;
  body->n_panels = (body->n_out + kPanelColumns - 1) / kPanelColumns;
  body->dtype = math == LinearMath::kBF16 ? DType::kBF16
                : uniform                 ? sources.front().dtype
                                          : DType::kF32;
  body->bias.assign(bias.begin(), bias.end());
  if (math == LinearMath::kBF16) {
    if (Status status = body->pack_bf16(context, sources); !status.ok()) return status;
  }
  if (Status status = body->pack_panels(context, sources); !status.ok()) return status;
  return PackedLinear(std::move(body));
}

PackedLinear::PackedLinear(std::unique_ptr<Body> body) : body_(std::move(body)) {}
PackedLinear::~PackedLinear() = default;
PackedLinear::PackedLinear(PackedLinear&&) noexcept = default;
PackedLinear& PackedLinear::operator=(PackedLinear&&) noexcept = default;

std::int64_t PackedLinear::n_in() const { return body_->n_in; }
std::int64_t PackedLinear::n_out() const { return body_->n_out; }
LinearMath PackedLinear::math() const { return body_->math; }
DType PackedLinear::dtype() const { return body_->dtype; }
std::size_t PackedLinear::bytes() const {
  return body_->panels.size() + body_->bias.size() * sizeof(float) +
         (body_->bf16 == nullptr ? 0 : body_->bf16->bytes());
}

void linear(const CpuContext& context, const PackedLinear& weights, ConstRows x, Rows y) {
  const PackedLinear::Body& body = *weights.body_;
  CHECK(x.width == body.n_in && y.width == body.n_out && x.n_rows == y.n_rows, "linear shapes");
  if (x.n_rows == 0) return;
  if (body.bf16 == nullptr || x.n_rows <= kMaxVectorRows) {
    body.run_panels(context, 0, x, y, true);
    return;
  }
  const Status status = body.bf16->apply(context, x, y);
  CHECK(status.ok(), status.to_string());
  if (body.bias.empty()) return;
  const KernelTable& kernels = kernels_for(context);
  for (std::int64_t i = 0; i < y.n_rows; ++i) kernels.add(body.bias.data(), y.width, y.row(i));
}

void linear_slice(const CpuContext& context, const PackedLinear& weights, std::int64_t k_begin,
                  ConstRows x, Rows y) {
  const PackedLinear::Body& body = *weights.body_;
  CHECK(k_begin >= 0 && x.width > 0 && x.width <= body.n_in - k_begin, "linear_slice range");
  CHECK(y.width == body.n_out && x.n_rows == y.n_rows, "linear_slice shapes");
  if (x.n_rows == 0) return;
  body.run_panels(context, k_begin, x, y, false);
}

}  // namespace spindle::kernels
