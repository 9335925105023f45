#pragma once
// RowsView: a borrowed row-major matrix whose rows may lie apart, such as the q, k and v columns of
// one fused projection. It owns nothing and says nothing about the device its memory is on.
//
// Thread-safety: a plain value.

#include <cstdint>
#include <type_traits>

#include "kernels/core/check.h"
#include "kernels/core/dtype.h"

namespace spindle {

template <typename T>
struct RowsView {
  T* data = nullptr;
  std::int64_t n_rows = 0;
  std::int64_t width = 0;   // elements of one row
  std::int64_t stride = 0;  // elements from one row's start to the next, >= width

  constexpr RowsView() = default;
  constexpr RowsView(T* rows, std::int64_t row_count, std::int64_t row_width)
      : RowsView(rows, row_count, row_width, row_width) {}
  constexpr RowsView(T* rows, std::int64_t row_count, std::int64_t row_width,
                     std::int64_t row_stride)
      : data(rows), n_rows(row_count), width(row_width), stride(row_stride) {}

  constexpr T* row(std::int64_t index) const { return data + index * stride; }

  // The columns [first, first + count) of every row.
  RowsView columns(std::int64_t first, std::int64_t count) const {
    CHECK(first >= 0 && count >= 0 && first + count <= width, "columns outside the view");
    return {data + first, n_rows, count, stride};
  }
  // The rows [first, first + count).
  RowsView rows(std::int64_t first, std::int64_t count) const {
    CHECK(first >= 0 && count >= 0 && first + count <= n_rows, "rows outside the view");
    return {data + first * stride, count, width, stride};
  }

  constexpr operator RowsView<const T>() const  // NOLINT: implicit on purpose
      requires(!std::is_const_v<T>) {
    return {data, n_rows, width, stride};
  }
};

using Rows = RowsView<float>;
using ConstRows = RowsView<const float>;
using F16Rows = RowsView<F16>;
using ConstF16Rows = RowsView<const F16>;
using Bf16Rows = RowsView<Bf16>;
using ConstBf16Rows = RowsView<const Bf16>;

}  // namespace spindle
