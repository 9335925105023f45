#include "kernels/embedding.h"

#include <algorithm>
#include <cstring>

#include "kernels/core/check.h"

namespace spindle::kernels {
namespace {

constexpr std::int64_t kMinElementsPerThread = 1 << 16;

void widen_row(const EmbeddingTable& table, std::int64_t id, float* out) {
  const std::size_t hidden = static_cast<std::size_t>(table.hidden);
  const auto* row = static_cast<const std::byte*>(table.data) +
                    static_cast<std::size_t>(id) * hidden * dtype_bytes(table.dtype);
  if (table.dtype == DType::kF32) {
    std::memcpy(out, row, hidden * sizeof(float));
    return;
  }
  const auto* halves = reinterpret_cast<const std::uint16_t*>(row);
  if (table.dtype == DType::kBF16) {
    for (std::size_t i = 0; i < hidden; ++i) out[i] = bf16_to_f32(halves[i]);
  } else {
    for (std::size_t i = 0; i < hidden; ++i) out[i] = f16_to_f32(halves[i]);
  }
}

}  // namespace

void embedding(const CpuContext& context, const EmbeddingTable& table,
               std::span<const std::int32_t> ids, Rows out) {
  CHECK(out.n_rows == static_cast<std::int64_t>(ids.size()) && out.width == table.hidden,
        "embedding shapes");
  const std::int64_t grain = kMinElementsPerThread / std::max<std::int64_t>(table.hidden, 1) + 1;
  context.parallel_for(out.n_rows, grain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int32_t id = ids[static_cast<std::size_t>(i)];
      CHECK(id >= 0 && id < table.n_vocab, "token id outside the embedding table");
      widen_row(table, id, out.row(i));
    }
  });
}

}  // namespace spindle::kernels
