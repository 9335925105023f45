#include "kernels/kv_compact.h"

#include <algorithm>
#include <cstring>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

template <typename Element, typename Round>
void write_side(KvSide side, ConstRows x, int capacity, std::byte* codes, Round round) {
  auto* out = reinterpret_cast<Element*>(codes);
  const std::int64_t d = x.width;
  std::memset(codes, 0, static_cast<std::size_t>(d * capacity) * sizeof(Element));
  for (std::int64_t t = 0; t < x.n_rows; ++t) {
    const float* row = x.row(t);
    if (side == KvSide::kKey) {
      for (std::int64_t i = 0; i < d; ++i) out[i * capacity + t] = round(row[i]);
    } else {
      for (std::int64_t i = 0; i < d; ++i) out[t * d + i] = round(row[i]);
    }
  }
}

}  // namespace

void kv_gather(const CpuContext& context, const std::byte* const* pages, std::int64_t tail_origin,
               std::span<const std::int32_t> positions, const KvPageLayout& layout, Rows k,
               Rows v) {
  const auto n = static_cast<std::int64_t>(positions.size());
  CHECK(k.n_rows == n && v.n_rows == n && k.width == layout.head_dim && v.width == layout.head_dim,
        "kv_gather shapes");
  const KernelTable& kernels = kernels_for(context);
  const ElementFormat format = page_format(layout.dtype);
  const std::int64_t d = layout.head_dim;
  const std::int64_t page_values = d * layout.page_tokens;
  auto* wide = reinterpret_cast<float*>(
      context.scratch(0, static_cast<std::size_t>(page_values) * sizeof(float)));
  std::int64_t open_page = -1;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t offset = positions[static_cast<std::size_t>(i)] - tail_origin;
    CHECK(offset >= 0, "a position before the tail");
    const std::int64_t page = offset / layout.page_tokens;
    const std::int64_t slot = offset % layout.page_tokens;
    if (page != open_page) {
      kernels.widen(format, pages[page], page_values, wide);
      open_page = page;
    }
    float* key = k.row(i);
    for (std::int64_t c = 0; c < d; ++c) key[c] = wide[c * layout.page_tokens + slot];
    const std::byte* values = pages[page] + layout.k_bytes();
    kernels.widen(format, values + slot * d * static_cast<std::int64_t>(dtype_bytes(layout.dtype)),
                  d, v.row(i));
  }
}

void kv_unrotate(const RopeTable& rope, std::span<const std::int32_t> positions, Rows k) {
  CHECK(static_cast<std::int64_t>(positions.size()) == k.n_rows && k.width >= rope.rotary_dim(),
        "kv_unrotate shapes");
  const std::int64_t half = rope.rotary_dim() / 2;
  const float norm = 1.0F / (rope.attention_scale() * rope.attention_scale());
  for (std::int64_t i = 0; i < k.n_rows; ++i) {
    const std::int32_t position = positions[static_cast<std::size_t>(i)];
    CHECK(position >= 0 && position < rope.max_positions(), "position outside the rope table");
    const float* cos = rope.cos(position);
    const float* sin = rope.sin(position);
    float* row = k.row(i);
    for (std::int64_t j = 0; j < half; ++j) {
      const float a = row[j];
      const float b = row[j + half];
      row[j] = (a * cos[j] + b * sin[j]) * norm;
      row[j + half] = (b * cos[j] - a * sin[j]) * norm;
    }
    for (std::int64_t j = 0; j < k.width; ++j) row[j] = f16_to_f32(f32_to_f16(row[j]));
  }
}

void kv_write_raw(KvSide side, ConstRows x, int capacity, const KvPageLayout& layout,
                  std::byte* codes) {
  CHECK(x.n_rows <= capacity && capacity <= kKvBlockTokens && x.width == layout.head_dim,
        "kv_write_raw shapes");
  switch (layout.dtype) {
    case DType::kF32:
      return write_side<float>(side, x, capacity, codes, [](float value) { return value; });
    case DType::kF16:
      return write_side<std::uint16_t>(side, x, capacity, codes, f32_to_f16);
    case DType::kBF16:
      return write_side<std::uint16_t>(side, x, capacity, codes, f32_to_bf16);
  }
}

}  // namespace spindle::kernels
