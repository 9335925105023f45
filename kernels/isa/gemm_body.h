// Micro-tiles and the linear operation. Included inside an anonymous namespace by the per-ISA
// translation units.
//
// Every output is one fma chain over k ascending that starts at zero. Storing the accumulator to
// fp32 memory between blocks of k and loading it again does not change the chain, nor does the
// number of rows or columns that a tile computes beside it, so all paths below agree bit for bit.

// A unit is two vectors of one 32-column panel: columns [sub, sub + kLanes) and the same + 16.
constexpr int kUnitsPerPanel = 16 / kLanes;

// Loaders widen one unit of a row. kStep: elements of the row per column of the unit's offset.
struct LoadF32 {
  using Element = float;
  static constexpr int kStep = 1;
  static V one(const float* p) { return load(p); }
  static void unit(const float* p, V& low, V& high) {
    low = load(p);
    high = load(p + 16);
  }
};
struct LoadF16 {
  using Element = std::uint16_t;
  static constexpr int kStep = 1;
  static V one(const std::uint16_t* p) { return load_f16(p); }
  static void unit(const std::uint16_t* p, V& low, V& high) {
    low = load_f16(p);
    high = load_f16(p + 16);
  }
};
struct LoadBf16 {
  using Element = std::uint16_t;
  static constexpr int kStep = 1;
  static V one(const std::uint16_t* p) { return load_bf16(p); }
  static void unit(const std::uint16_t* p, V& low, V& high) {
    low = load_bf16(p);
    high = load_bf16(p + 16);
  }
};
struct LoadBf16Paired {
  using Element = std::uint16_t;
  static constexpr int kStep = 2;
  static void unit(const std::uint16_t* p, V& low, V& high) { load_bf16_pair(p, low, high); }
};

// Codes of 4 bits, a row of a panel in 16 bytes: column i in the low half of byte i, i + 16 in the
// high half. As numbers, or as places in a table of 16.
struct LoadCodes {
  using Element = std::uint8_t;
  static constexpr int kStep = 1;
  static void unit(const std::uint8_t* p, V& low, V& high) { codes_to_float(p, low, high); }
};
struct LoadLevels {
  using Element = std::uint8_t;
  static constexpr int kStep = 1;
  static constexpr bool kByTable = true;
  static void unit(const float* table, const std::uint8_t* p, V& low, V& high) {
    lookup_codes(table, p, low, high);
  }
};

// Where a tile reads and writes. `b` rows are `b_stride` elements apart, panels `b_panel`.
template <class Element>
struct TileOperands {
  const float* a;
  const Element* b;
  std::int64_t b_stride;
  std::int64_t b_panel;
  std::int64_t n_k;
  // Bytes from each weight row to the one to prefetch while it is used; 0 for none.
  std::int64_t prefetch_bytes;
  float* c;
  std::int64_t c_stride;
  bool accumulate;
  // Where the next tall tile will write, fetched while this one computes; null for none.
  const float* next_c;
  const float* table;  // [16], for LoadLevels only
};

template <class Loader>
inline void load_unit(const TileOperands<typename Loader::Element>& t,
                      const typename Loader::Element* p, V& low, V& high) {
  if constexpr (requires { Loader::kByTable; }) {
    Loader::unit(t.table, p, low, high);
  } else {
    Loader::unit(p, low, high);
  }
}

// c[r][unit] (+)= sum over k of a[k * kAK + r * kARow] * b[k][unit] for kRows rows and kUnits units
// from `first_unit` on.
template <class Loader, int kRows, int kUnits, int kARow, int kAK>
__attribute__((noinline)) void tile(const TileOperands<typename Loader::Element>& t,
                                    std::int64_t first_unit) {
  V acc[kRows][2 * kUnits];
  const typename Loader::Element* b[kUnits];
  float* c[kUnits];
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
    const std::int64_t panel = (first_unit + u) / kUnitsPerPanel;
    const std::int64_t sub = (first_unit + u) % kUnitsPerPanel * kLanes;
    b[u] = t.b + panel * t.b_panel + sub * Loader::kStep;
    c[u] = t.c + panel * kPanelColumns + sub;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      acc[r][2 * u] = t.accumulate ? load(c[u] + r * t.c_stride) : splat(0.0F);
      acc[r][2 * u + 1] = t.accumulate ? load(c[u] + r * t.c_stride + 16) : splat(0.0F);
    }
  }
  if constexpr (2 * kRows > kMaxTileRows) {
    if (t.next_c != nullptr) {
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(t.next_c + r * t.c_stride, 1);
        __builtin_prefetch(t.next_c + r * t.c_stride + 16, 1);
      }
    }
  }
  const float* a = t.a;
  const std::int64_t b_stride = t.b_stride;
  [[maybe_unused]] const std::int64_t prefetch_bytes = t.prefetch_bytes;
  for (std::int64_t k = t.n_k; k > 0; --k) {
    V low[kUnits];
    V high[kUnits];
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      load_unit<Loader>(t, b[u], low[u], high[u]);
      // Tall tiles are bound by arithmetic, and the hardware keeps up with them.
      if constexpr (2 * kRows <= kMaxTileRows) {
        __builtin_prefetch(reinterpret_cast<const char*>(b[u]) + prefetch_bytes);
      }
      b[u] += b_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V value = splat(a[r * kARow]);
#pragma GCC unroll 8
      for (int u = 0; u < kUnits; ++u) {
        acc[r][2 * u] = fma(value, low[u], acc[r][2 * u]);
        acc[r][2 * u + 1] = fma(value, high[u], acc[r][2 * u + 1]);
      }
    }
    a += kAK;
  }
#pragma GCC unroll 8
  for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      store(c[u] + r * t.c_stride, acc[r][2 * u]);
      store(c[u] + r * t.c_stride + 16, acc[r][2 * u + 1]);
    }
  }
}

// Units [0, n_units) with as many per step as the registers hold: few rows need several independent
// chains to hide the fma latency, and several streams to fill the memory pipeline.
template <class Loader, int kRows, int kARow, int kAK>
void tile_units(const TileOperands<typename Loader::Element>& t, std::int64_t n_units) {
  constexpr int kFit = (kVectorRegisters - 1) / (2 * (kRows + 1));
  constexpr int kUnits = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  std::int64_t unit = 0;
  if constexpr (kUnits > 1) {
    for (; unit + kUnits <= n_units; unit += kUnits) {
      tile<Loader, kRows, kUnits, kARow, kAK>(t, unit);
    }
  }
  if constexpr (kUnits > 2) {
    for (; unit + 2 <= n_units; unit += 2) tile<Loader, kRows, 2, kARow, kAK>(t, unit);
  }
  for (; unit < n_units; ++unit) tile<Loader, kRows, 1, kARow, kAK>(t, unit);
}

// Packed rows, a[k * n_rows + r], for 1 <= n_rows <= kMaxTileRows.
template <class Loader, int kRows = 1>
void packed_tile(int n_rows, const TileOperands<typename Loader::Element>& t,
                 std::int64_t n_units) {
  if constexpr (kRows < kMaxTileRows) {
    if (n_rows != kRows) return packed_tile<Loader, kRows + 1>(n_rows, t, n_units);
  }
  tile_units<Loader, kRows, 1, kRows>(t, n_units);
}

// Rows kStride floats apart, a[r * kStride + k].
template <class Loader, int kStride, int kRows = 1>
void strided_tile(int n_rows, const TileOperands<typename Loader::Element>& t,
                  std::int64_t n_units) {
  if constexpr (kRows < kMaxTileRows) {
    if (n_rows != kRows) return strided_tile<Loader, kStride, kRows + 1>(n_rows, t, n_units);
  }
  tile_units<Loader, kRows, kStride, 1>(t, n_units);
}

// Rows are cut into tiles of nearly equal size: [tile_begin(t), tile_begin(t + 1)).
inline std::int64_t tile_count(std::int64_t n_rows) {
  return (n_rows + kMaxTileRows - 1) / kMaxTileRows;
}
inline std::int64_t tile_begin(std::int64_t n_rows, std::int64_t index) {
  return n_rows * index / tile_count(n_rows);
}

// Widens n_k rows of one 32-column panel to [n_k][32] fp32 in plain column order.
template <class Loader>
void expand_panel(const typename Loader::Element* b, std::int64_t n_k, float* out) {
  for (std::int64_t k = 0; k < n_k; ++k) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnitsPerPanel; ++u) {
      V low;
      V high;
      Loader::unit(b + u * kLanes * Loader::kStep, low, high);
      store(out + u * kLanes, low);
      store(out + u * kLanes + 16, high);
    }
    b += kPanelColumns;
    out += kPanelColumns;
  }
}
