// The linear operation on packed panels. Included inside an anonymous namespace by the per-ISA
// translation units, after gemm_body.h.

static_assert(kMaxTileRows <= kTallestTile);

// How far the weight streams are fetched ahead when memory is the limit.
constexpr std::int64_t kStreamAheadBytes = 1536;
constexpr std::int64_t kStreamPanels = 4;

inline float rounded_to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  bits = nan ? bits | 0x400000U : bits + 0x7fffU + ((bits >> 16) & 1U);
  bits &= 0xffff0000U;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// x[row_begin + r][k_begin + k] to out[k * n_rows + r]: runs of k short enough that all rows' runs
// stay in the L1 cache, written in order. kRows: n_rows, or 0 when it is known at run time only.
template <bool kRound, int kRows>
void pack_rows(const LinearJob& job, std::int64_t row_begin, std::int64_t rows,
               std::int64_t k_begin, std::int64_t n_k, float* out) {
  const std::int64_t n_rows = kRows > 0 ? kRows : rows;
  constexpr std::int64_t kRun = 32;
  const std::int64_t stride = job.x_stride;
  const float* x = job.x + row_begin * stride + k_begin;
  for (std::int64_t k0 = 0; k0 < n_k; k0 += kRun) {
    const std::int64_t k1 = k0 + kRun < n_k ? k0 + kRun : n_k;
    for (std::int64_t k = k0; k < k1; ++k) {
      const float* column = x + k;
#pragma GCC unroll 16
      for (std::int64_t r = 0; r < n_rows; ++r, column += stride) {
        *out++ = kRound ? rounded_to_bf16(*column) : *column;
      }
    }
  }
}

inline void pack_tile(const LinearJob& job, std::int64_t row_begin, std::int64_t n_rows,
                      std::int64_t k_begin, std::int64_t n_k, float* out) {
  if (job.round_x_to_bf16) {
    pack_rows<true, 0>(job, row_begin, n_rows, k_begin, n_k, out);
  } else if (n_rows == kMaxTileRows) {
    pack_rows<false, kMaxTileRows>(job, row_begin, n_rows, k_begin, n_k, out);
  } else {
    pack_rows<false, 0>(job, row_begin, n_rows, k_begin, n_k, out);
  }
}

// One tile of packed rows against panels that end inside the matrix or, for the last panel of a
// width that is no multiple of 32, through a full-width copy of its part of y.
template <class Loader>
void tile_to_y(const LinearJob& job, int n_rows, std::int64_t row_begin, std::int64_t panel,
               std::int64_t n_panels, TileOperands<typename Loader::Element> t) {
  const std::int64_t column = panel * kPanelColumns;
  float* y = job.y + row_begin * job.y_stride + column;
  const std::int64_t n_full = (job.n_out - column) / kPanelColumns;
  const std::int64_t n_direct = n_panels < n_full ? n_panels : n_full;
  t.c = y;
  t.c_stride = job.y_stride;
  packed_tile<Loader>(n_rows, t, n_direct * kUnitsPerPanel);
  if (n_direct == n_panels) return;

  float edge[kMaxTileRows * kPanelColumns] = {};
  y += n_direct * kPanelColumns;
  const std::int64_t width = job.n_out - column - n_direct * kPanelColumns;
  if (t.accumulate) {
    for (std::int64_t r = 0; r < n_rows; ++r) {
      for (std::int64_t j = 0; j < width; ++j)
        edge[r * kPanelColumns + j] = y[r * job.y_stride + j];
    }
  }
  t.b += n_direct * t.b_panel;
  t.c = edge;
  t.c_stride = kPanelColumns;
  packed_tile<Loader>(n_rows, t, kUnitsPerPanel);
  for (std::int64_t r = 0; r < n_rows; ++r) {
    for (std::int64_t j = 0; j < width; ++j) y[r * job.y_stride + j] = edge[r * kPanelColumns + j];
  }
}

// Few rows: each weight is read once from memory and widened in registers.
template <class Loader>
void linear_direct(const LinearJob& job, std::int64_t row_begin, std::int64_t n_rows,
                   std::int64_t panel_begin, std::int64_t panel_end, float* scratch) {
  const std::int64_t k = job.n_in;
  const std::int64_t n_tiles = tile_count(n_rows);
  for (std::int64_t i = 0; i < n_tiles; ++i) {
    const std::int64_t first = tile_begin(n_rows, i);
    pack_tile(job, row_begin + first, tile_begin(n_rows, i + 1) - first, 0, k, scratch + first * k);
  }
  TileOperands<typename Loader::Element> t{};
  t.b_stride = kPanelColumns;
  t.b_panel = job.panel_depth * kPanelColumns;
  t.n_k = k;
  t.prefetch_bytes = kStreamAheadBytes;
  for (std::int64_t panel = panel_begin; panel < panel_end; panel += kStreamPanels) {
    const std::int64_t left = panel_end - panel;
    t.b = static_cast<const typename Loader::Element*>(job.panels) + panel * t.b_panel;
    for (std::int64_t i = 0; i < n_tiles; ++i) {
      const std::int64_t first = tile_begin(n_rows, i);
      t.a = scratch + first * k;
      tile_to_y<Loader>(job, static_cast<int>(tile_begin(n_rows, i + 1) - first), row_begin + first,
                        panel, left < kStreamPanels ? left : kStreamPanels, t);
    }
  }
}

// Many rows: blocks of k, each panel block widened once and used by all tiles of rows.
template <class Loader>
void linear_blocked(const LinearJob& job, std::int64_t row_begin, std::int64_t n_rows,
                    std::int64_t panel_begin, std::int64_t panel_end, float* scratch) {
  float* wide = scratch;
  float* packed = scratch + kLinearDepthBlock * kPanelColumns;
  const std::int64_t n_tiles = tile_count(n_rows);
  TileOperands<float> t{};
  t.b_stride = kPanelColumns;
  t.b = wide;
  for (std::int64_t k = 0; k < job.n_in; k += kLinearDepthBlock) {
    const std::int64_t n_k = job.n_in - k < kLinearDepthBlock ? job.n_in - k : kLinearDepthBlock;
    for (std::int64_t i = 0; i < n_tiles; ++i) {
      const std::int64_t first = tile_begin(n_rows, i);
      pack_tile(job, row_begin + first, tile_begin(n_rows, i + 1) - first, k, n_k,
                packed + first * n_k);
    }
    t.n_k = n_k;
    t.accumulate = k > 0;
    for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
      expand_panel<Loader>(static_cast<const typename Loader::Element*>(job.panels) +
                               (panel * job.panel_depth + k) * kPanelColumns,
                           n_k, wide);
      for (std::int64_t i = 0; i < n_tiles; ++i) {
        const std::int64_t first = tile_begin(n_rows, i);
        t.a = packed + first * n_k;
        const std::int64_t last = tile_begin(n_rows, i + 1);
        t.next_c = i + 1 < n_tiles
                       ? job.y + (row_begin + last) * job.y_stride + panel * kPanelColumns
                       : job.y + row_begin * job.y_stride + (panel + 1) * kPanelColumns;
        tile_to_y<LoadF32>(job, static_cast<int>(last - first), row_begin + first, panel, 1, t);
      }
    }
  }
}

template <class Loader>
void linear_format(const LinearJob& job, std::int64_t row_begin, std::int64_t n_rows,
                   std::int64_t panel_begin, std::int64_t panel_end, float* scratch) {
  if (tile_count(n_rows) <= kLinearDirectTiles) {
    linear_direct<Loader>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
  } else {
    linear_blocked<Loader>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
  }
}

void linear_range(const LinearJob& job, std::int64_t row_begin, std::int64_t row_end,
                  std::int64_t panel_begin, std::int64_t panel_end, float* scratch) {
  const std::int64_t n_rows = row_end - row_begin;
  switch (job.format) {
    case ElementFormat::kF32:
      linear_format<LoadF32>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
      break;
    case ElementFormat::kF16:
      linear_format<LoadF16>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
      break;
    case ElementFormat::kBF16:
      linear_format<LoadBf16>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
      break;
    case ElementFormat::kBF16Paired:
      linear_format<LoadBf16Paired>(job, row_begin, n_rows, panel_begin, panel_end, scratch);
      break;
  }
  if (job.bias == nullptr) return;
  const std::int64_t begin = panel_begin * kPanelColumns;
  const std::int64_t limit = panel_end * kPanelColumns;
  const std::int64_t end = limit < job.n_out ? limit : job.n_out;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    add_row(job.bias + begin, end - begin, job.y + r * job.y_stride + begin);
  }
}
