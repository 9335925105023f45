// Compressed blocks (kernels/kv_block.h) to the two shapes that attention computes with: K
// [head_dim][32] and V [32][value_stride] in fp32. Included inside an anonymous namespace by the
// per-ISA translation units, after gemm_body.h and math_body.h. Functions of kv_block.h must not be
// called here, or their inline bodies would be emitted for this instruction set.
//
// Slots outside a block's [first, end) decode to finite values, which attention leaves out.
//
// Keys before RoPE are rotated by the angles of the steps from their block's first position, or
// from that of their group of tokens: its own angle is taken back from the queries, which are
// fewer.

struct BlockScratch {
  float* k;             // [head_dim][32]
  float* v;             // [32][value_stride], zero past head_dim
  float* rows;          // [32][head_dim]
  float* angles;        // [2][half_dim][32]
  float* steps;         // [2][half_dim][32]: cos - sin and cos + sin of 0..31
  float* k_mean;        // [head_dim], for lloyd: see start_block_decoding()
  std::uint8_t* codes;  // [16 * head_dim]
  // Codes of a later block of the same format, which are fetched a line at a time while those of
  // this one are used; its own where there is none. Of token ids the rows are fetched.
  const std::byte* later_k;
  const std::byte* later_v;
};

inline void prefetch_line(const void* p) { __builtin_prefetch(p); }

constexpr bool is_lloyd_format(KvFormat format) {
  return format >= KvFormat::kLloyd1 && format <= KvFormat::kLloyd4;
}
constexpr bool is_kivi_format(KvFormat format) {
  return format == KvFormat::kKivi4 || format == KvFormat::kKivi2;
}
constexpr bool is_reference_format(KvFormat format) {
  return format == KvFormat::kCodebook || format == KvFormat::kToken;
}
constexpr int code_bits(KvFormat format) {
  switch (format) {
    case KvFormat::kInt4:
    case KvFormat::kKivi4:
    case KvFormat::kLloyd4:
      return 4;
    case KvFormat::kLloyd3:
      return 3;
    case KvFormat::kKivi2:
    case KvFormat::kLloyd2:
      return 2;
    default:
      return 1;
  }
}

inline const std::uint16_t* halves(const std::byte* p) {
  return reinterpret_cast<const std::uint16_t*>(p);
}
inline float half_to_float(std::uint16_t value) {
  std::uint16_t lanes[kLanes] = {value};
  float out[kLanes];
  store(out, load_f16(lanes));
  return out[0];
}
// n halves (a multiple of 16) to floats.
inline void widen_halves(const std::uint16_t* p, std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; i += kLanes) store(out + i, load_f16(p + i));
}

// Planes of `bits` bits to the plane of nibbles that the loaders of gemm_body.h read, 16 bytes for
// each of n_groups groups; returned as they lie when they are one, else written to `out`.
inline const std::uint8_t* nibble_plane(int bits, const std::byte* codes, std::int64_t n_groups,
                                        std::uint8_t* out) {
  const auto* p = reinterpret_cast<const std::uint8_t*>(codes);
  if (bits == 4) return p;
  const std::uint8_t* pairs = bits >= 2 ? p : nullptr;
  const std::uint8_t* single = bits == 3 ? p + 8 * n_groups : bits == 1 ? p : nullptr;
  planes_to_nibbles(pairs, single, bits - 1, n_groups, out);
  return out;
}

// Rows of groups of codes to fp32, as LoadCodes or LoadLevels would widen them.
template <class Loader>
void expand_codes(const float* table, const std::uint8_t* codes, std::int64_t n_rows,
                  std::int64_t groups_per_row, std::int64_t row_stride, float* out) {
  TileOperands<std::uint8_t> t{};
  t.table = table;
  for (std::int64_t row = 0; row < n_rows; ++row) {
    for (std::int64_t g = 0; g < groups_per_row; ++g) {
      for (int sub = 0; sub < 16; sub += kLanes) {
        V low;
        V high;
        load_unit<Loader>(t, codes + sub, low, high);
        store(out + row * row_stride + g * kPanelColumns + sub, low);
        store(out + row * row_stride + g * kPanelColumns + sub + 16, high);
      }
      codes += 16;
    }
  }
}

// Butterflies of kRadix vectors in registers.
template <int kRadix>
inline void butterflies(V* x) {
#pragma GCC unroll 3
  for (int h = 1; h < kRadix; h *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kRadix; i += 2 * h) {
#pragma GCC unroll 4
      for (int j = i; j < i + h; ++j) {
        const V a = x[j];
        const V b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
}

// The stages h, 2 h .. kRadix h / 2 of x H over n_rows rows of 32 columns.
template <int kRadix>
void hadamard_stages(float* x, std::int64_t n_rows, std::int64_t h) {
  for (std::int64_t base = 0; base < n_rows; base += kRadix * h) {
    for (std::int64_t r = base; r < base + h; ++r) {
      for (int c = 0; c < kPanelColumns; c += kLanes) {
        float* p = x + r * kPanelColumns + c;
        V rows[kRadix];
#pragma GCC unroll 8
        for (int i = 0; i < kRadix; ++i) rows[i] = load(p + i * h * kPanelColumns);
        butterflies<kRadix>(rows);
#pragma GCC unroll 8
        for (int i = 0; i < kRadix; ++i) store(p + i * h * kPanelColumns, rows[i]);
      }
    }
  }
}

// x H / sqrt(n) of one vector, n the largest power of two that divides n_values.
inline void hadamard_vector(float* x, std::int64_t n_values) {
  const std::int64_t n = n_values & -n_values;
  for (std::int64_t h = 1; h < n; h *= 2) {
    for (std::int64_t i = 0; i < n_values; i += 2 * h) {
      for (std::int64_t j = i; j < i + h; ++j) {
        const float a = x[j];
        const float b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
    }
  }
  const float scale = 1.0F / __builtin_sqrtf(static_cast<float>(n));
  for (std::int64_t i = 0; i < n_values; ++i) x[i] *= scale;
}

// 32 rows of n_columns to columns-major [n_columns][32].
inline void transpose_rows(const float* const* rows, std::int64_t n_columns, float* out) {
  std::int64_t column = 0;
  for (; column + kLanes <= n_columns; column += kLanes) {
    for (int row = 0; row < kPanelColumns; row += kLanes) {
      V columns[kLanes];
      load_transposed(rows + row, column, columns);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (column + i) * kPanelColumns + row, columns[i]);
    }
  }
  for (; column < n_columns; ++column) {
    for (int row = 0; row < kPanelColumns; ++row) {
      out[column * kPanelColumns + row] = rows[row][column];
    }
  }
}

// What lies in hidden slots and past the last token is never used as an index: they read the
// nearest visible slot's.
inline int visible_slot(const KvBlock& block, int slot) {
  if (slot < block.first) return block.first;
  return slot < block.end ? slot : block.end - 1;
}
inline std::int64_t index_at(const std::byte* values, bool wide, int slot) {
  if (wide) return reinterpret_cast<const std::uint32_t*>(values)[slot];
  return halves(values)[slot];
}

// The turn of a pair (a, b) of vectors by an angle: (a cos - b sin, b cos + a sin).
inline void turn(V& a, V& b, V cos, V sin) {
  const V low = fnma(b, sin, a * cos);
  b = fma(a, sin, b * cos);
  a = low;
}
// The same of (a + b, a - b), the last stage of a Hadamard transform.
inline void turn_sums(V& a, V& b, V cos_less_sin, V cos_plus_sin) {
  const V low = fma(a, cos_less_sin, b * cos_plus_sin);
  b = fnma(b, cos_less_sin, a * cos_plus_sin);
  a = low;
}

inline std::int64_t slot_position(const AttentionTile& tile, const KvBlock& block, int slot) {
  const std::int64_t position =
      index_at(block.positions, tile.context->wide_positions, visible_slot(block, slot));
  return position < tile.rope.max_positions ? position : tile.rope.max_positions - 1;
}

// The position by which queries are turned back before they meet the block's keys, so that keys
// need the angles of small steps only; 0 when they get those of their positions.
struct BlockTurn {
  std::int64_t position;
  bool by_steps;
};

inline BlockTurn block_turn(const AttentionTile& tile, const KvBlock& block) {
  if (block.positions == nullptr) return {block.first_position, true};
  const std::int64_t first = slot_position(tile, block, 0);
  const std::int64_t span = slot_position(tile, block, kPanelColumns - 1) - first;
  if (span >= 0 && span < kMaxListedSpan) return {first, true};
  return {0, false};
}

// Steps of listed positions from `base`.
inline void list_steps(const AttentionTile& tile, const KvBlock& block, std::int64_t base,
                       std::int32_t* steps) {
  const auto first = static_cast<std::int32_t>(base);
  const auto last = static_cast<std::int32_t>(tile.rope.max_positions - 1);
  const auto list = [&](const auto* positions) {
    for (int t = block.first; t < block.end; ++t) {
      const auto position = static_cast<std::int32_t>(positions[t]);
      steps[t] = (position < last ? position : last) - first;
    }
  };
  if (tile.context->wide_positions) {
    list(reinterpret_cast<const std::uint32_t*>(block.positions));
  } else {
    list(halves(block.positions));
  }
  for (int t = 0; t < block.first; ++t) steps[t] = steps[block.first];
  for (int t = block.end; t < kPanelColumns; ++t) steps[t] = steps[block.end - 1];
}

// Angles of a block's keys as two numbers each, [half_dim][32]: cos and sin, or their difference
// and sum.
struct BlockAngles {
  const float* first;
  const float* second;
};

inline void sum_angles(const float* cos, const float* sin, std::int64_t n, float* less,
                       float* plus) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const V c = load(cos + i);
    const V s = load(sin + i);
    store(less + i, c - s);
    store(plus + i, c + s);
  }
}

// cos and sin of the keys' own positions.
inline BlockAngles position_angles(const AttentionTile& tile, const KvBlock& block,
                                   const BlockScratch& scratch) {
  const AttentionRope& rope = tile.rope;
  const std::int64_t half = rope.half_dim;
  float* cos = scratch.angles;
  float* sin = scratch.angles + half * kPanelColumns;
  const float* cos_rows[kPanelColumns];
  const float* sin_rows[kPanelColumns];
  for (int t = 0; t < kPanelColumns; ++t) {
    const std::int64_t position = slot_position(tile, block, t);
    cos_rows[t] = rope.cos + position * half;
    sin_rows[t] = rope.sin + position * half;
  }
  transpose_rows(cos_rows, half, cos);
  transpose_rows(sin_rows, half, sin);
  return {cos, sin};
}

// cos and sin of the steps from block_turn()'s position.
inline BlockAngles block_angles(const AttentionTile& tile, const KvBlock& block,
                                const BlockScratch& scratch) {
  const AttentionRope& rope = tile.rope;
  if (block.positions == nullptr) return {rope.step_cos, rope.step_sin};
  const BlockTurn turn = block_turn(tile, block);
  if (!turn.by_steps) return position_angles(tile, block, scratch);
  float* cos = scratch.angles;
  float* sin = scratch.angles + rope.half_dim * kPanelColumns;
  std::int32_t steps[kPanelColumns];
  list_steps(tile, block, turn.position, steps);
  compose_angles<false>(rope, steps, cos, sin);
  return {cos, sin};
}

// The same for keys that are turned by halves: differences and sums, from a position for each group
// of tokens.
struct GroupTurns {
  BlockAngles angles;
  const std::int32_t* near_steps;  // null, or what to look up in rows of `angles`
  std::int64_t positions[kTurnGroups];
  int n_groups;  // that differ; 0 where keys get the angles of their positions
};

// `steps` is memory for [32].
inline GroupTurns group_turns(const AttentionTile& tile, const KvBlock& block,
                              const BlockScratch& scratch, std::int32_t* steps) {
  const AttentionRope& rope = tile.rope;
  const std::int64_t n_half = rope.half_dim * kPanelColumns;
  GroupTurns turns{{scratch.steps, scratch.steps + n_half}, nullptr, {}, 1};
  if (block.positions == nullptr) {
    turns.positions[0] = block.first_position;
    return turns;
  }
  float* less = scratch.angles;
  float* plus = scratch.angles + n_half;
  if constexpr (kTurnGroups > 1) {
    const std::uint32_t largest =
        group_steps(block.positions, tile.context->wide_positions, block.first, block.end,
                    rope.max_positions - 1, steps, turns.positions);
    turns.n_groups = kTurnGroups;
    if (largest < kPanelColumns) {
      turns.near_steps = steps;
      return turns;
    }
    if (largest < kMaxListedSpan) {
      compose_angles<true>(rope, steps, less, plus);
      turns.angles = {less, plus};
      return turns;
    }
  }
  turns.n_groups = 0;
  turns.angles = position_angles(tile, block, scratch);
  sum_angles(turns.angles.first, turns.angles.second, n_half, less, plus);
  return turns;
}

// Rotates rows i and i + half_dim of K.
inline void rotate_block(const AttentionTile& tile, const KvBlock& block,
                         const BlockScratch& scratch) {
  const BlockAngles angles = block_angles(tile, block, scratch);
  const std::int64_t n_half = tile.rope.half_dim * kPanelColumns;
  for (std::int64_t i = 0; i < n_half; i += kLanes) {
    float* p = scratch.k + i;
    V low = load(p);
    V high = load(p + n_half);
    turn(low, high, load(angles.first + i), load(angles.second + i));
    store(p, low);
    store(p + n_half, high);
  }
}

// Row of head_dim floats of a slot, for the formats that store a reference.
inline void reference_row(const AttentionTile& tile, const KvBlock& block, bool is_key, int slot,
                          float* out) {
  const KvHeadContext& context = *tile.context;
  const KvFormat format = is_key ? block.codec.k : block.codec.v;
  const int t = visible_slot(block, slot);
  if (format == KvFormat::kToken) {
    const std::int64_t id = index_at(block.k.codes, context.wide_ids, t);
    const std::uint16_t* table = is_key ? context.k_tokens : context.v_tokens;
    widen_halves(table + id * context.token_stride, tile.head_dim, out);
    return;
  }
  const KvPieces& pieces = is_key ? block.k : block.v;
  const std::byte* const* chunks = is_key ? context.k_entries : context.v_entries;
  const std::int64_t entry = index_at(pieces.codes, false, t);
  const std::uint16_t* row =
      halves(chunks[entry / kCodebookChunkEntries]) + entry % kCodebookChunkEntries * tile.head_dim;
  const V magnitude = splat(half_to_float(halves(pieces.scales)[t]));
  for (int d = 0; d < tile.head_dim; d += kLanes) store(out + d, load_f16(row + d) * magnitude);
}

// The row that reference_row() will widen for a slot of the block whose ids are `ids`.
inline void prefetch_token_row(const AttentionTile& tile, const std::byte* ids, bool is_key,
                               int slot) {
  const KvHeadContext& context = *tile.context;
  const std::uint16_t* row = (is_key ? context.k_tokens : context.v_tokens) +
                             index_at(ids, context.wide_ids, slot) * context.token_stride;
  for (int d = 0; d < tile.head_dim; d += 32) prefetch_line(row + d);
}

// Whether the pairs of the rotation are those of the Hadamard transform's last stage, which then is
// taken together with the rotation.
inline bool is_turned_by_halves(const AttentionTile& tile) {
  return (tile.head_dim & (tile.head_dim - 1)) == 0 && 2 * tile.rope.half_dim == tile.head_dim;
}

// The mean of lloyd K as lookup_lloyd_key() wants it, before a Hadamard transform without a factor,
// and the angles that blocks share.
inline void start_block_decoding(const AttentionTile& tile, const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  const AttentionRope& rope = tile.rope;
  if (tile.context->k_mean != nullptr) {
    widen_halves(tile.context->k_mean, d, scratch.k_mean);
    hadamard_vector(scratch.k_mean, d);
    const float norm = 1.0F / __builtin_sqrtf(static_cast<float>(d & -d));
    for (std::int64_t i = 0; i < d; ++i) scratch.k_mean[i] *= norm;
  }
  const std::int64_t n_half = rope.half_dim * kPanelColumns;
  sum_angles(rope.step_cos, rope.step_sin, n_half, scratch.steps, scratch.steps + n_half);
}

// Levels times scale plus mean and the stages h, 2 h and 4 h of the Hadamard transform, in
// registers; its 1 / sqrt(n) is in the scales and the mean.
inline void lookup_lloyd_key(const AttentionTile& tile, const KvBlock& block, std::int64_t h,
                             const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  const int bits = code_bits(block.codec.k);
  const std::uint8_t* codes = nibble_plane(bits, block.k.codes, d, scratch.codes);
  const float* levels = tile.lloyd_levels + 16 * (bits - 1);
  const V norm = splat(1.0F / __builtin_sqrtf(static_cast<float>(d & -d)));
  for (int sub = 0; sub < 16; sub += kLanes) {
    const V scale_low = load_f16(halves(block.k.scales) + sub) * norm;
    const V scale_high = load_f16(halves(block.k.scales) + sub + 16) * norm;
    for (std::int64_t group = 0; group < d / 8; ++group) {
      // Offsets of a group of eight rows: h is a power of two.
      const std::int64_t first = ((group & -h) << 3) + (group & (h - 1));
      for (int line = 0; line < bits; line += 2) {
        prefetch_line(scratch.later_k + 32 * bits * group + 64 * (line / 2));
      }
      V low[8];
      V high[8];
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const std::int64_t i = first + j * h;
        lookup_codes(levels, codes + 16 * i + sub, low[j], high[j]);
        const V mean = splat(scratch.k_mean[i]);
        low[j] = fma(low[j], scale_low, mean);
        high[j] = fma(high[j], scale_high, mean);
      }
      butterflies<8>(low);
      butterflies<8>(high);
      float* out = scratch.k + first * kPanelColumns + sub;
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        store(out + j * h * kPanelColumns, low[j]);
        store(out + j * h * kPanelColumns + 16, high[j]);
      }
    }
  }
}

// Lloyd K up to where finish_turned() goes on.
inline void decode_lloyd_by_halves(const AttentionTile& tile, const KvBlock& block,
                                   const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  lookup_lloyd_key(tile, block, d / 16, scratch);
  if (d == 256) hadamard_stages<2>(scratch.k, d, 8);
}

inline void decode_lloyd_key(const AttentionTile& tile, const KvBlock& block,
                             const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  const std::int64_t n = d & -d;
  lookup_lloyd_key(tile, block, 1, scratch);
  // n / 8 is 4, 8, 16 or 32.
  for (std::int64_t h = 8; h < n;) {
    const bool by_eight = n / h == 8 || n / h == 32;
    by_eight ? hadamard_stages<8>(scratch.k, d, h) : hadamard_stages<4>(scratch.k, d, h);
    h *= by_eight ? 8 : 4;
  }
  rotate_block(tile, block, scratch);
}

inline void decode_kivi_key(const AttentionTile& tile, const KvBlock& block,
                            const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  const std::uint8_t* codes =
      nibble_plane(code_bits(block.codec.k), block.k.codes, d, scratch.codes);
  float* steps = scratch.rows;  // scale [d], minimum [d]
  widen_halves(halves(block.k.scales), 2 * d, steps);
  for (std::int64_t i = 0; i < d; ++i) {
    const V scale = splat(steps[i]);
    const V minimum = splat(steps[d + i]);
    for (int sub = 0; sub < 16; sub += kLanes) {
      V low;
      V high;
      codes_to_float(codes + 16 * i + sub, low, high);
      store(scratch.k + i * kPanelColumns + sub, fma(low, scale, minimum));
      store(scratch.k + i * kPanelColumns + sub + 16, fma(high, scale, minimum));
    }
  }
}

// Raw K of a capacity below 32.
inline void decode_short_key(const AttentionTile& tile, const KvBlock& block,
                             const BlockScratch& scratch) {
  const std::int64_t capacity = block.capacity;
  widen_values(tile.format, block.k.codes, tile.head_dim * capacity, scratch.rows);
  for (std::int64_t i = 0; i < tile.head_dim; ++i) {
    float* row = scratch.k + i * kPanelColumns;
    for (int t = 0; t < kPanelColumns; t += kLanes) store(row + t, splat(0.0F));
    for (std::int64_t t = 0; t < capacity; ++t) row[t] = scratch.rows[i * capacity + t];
  }
}

// K of a block, for every format but those that are used as they lie: kInt4 and raw blocks of 32
// tokens; lloyd's may be taken by halves.
inline void decode_key(const AttentionTile& tile, const KvBlock& block,
                       const BlockScratch& scratch) {
  const KvFormat format = block.codec.k;
  if (format == KvFormat::kRaw) return decode_short_key(tile, block, scratch);
  if (is_kivi_format(format)) return decode_kivi_key(tile, block, scratch);
  if (is_lloyd_format(format)) return decode_lloyd_key(tile, block, scratch);
  const float* rows[kPanelColumns];
  for (int t = 0; t < kPanelColumns; ++t) {
    float* row = scratch.rows + t * tile.head_dim;
    rows[t] = row;
    if (format == KvFormat::kToken) prefetch_token_row(tile, scratch.later_k, true, t);
    reference_row(tile, block, true, t, row);
  }
  transpose_rows(rows, tile.head_dim, scratch.k);
  rotate_block(tile, block, scratch);
}

inline bool is_pre_rope_format(KvFormat format) {
  return is_lloyd_format(format) || is_reference_format(format);
}

// Queries turned back by a position, so that keys turned by the steps from there on meet them as
// keys turned by their positions would have met the queries. Rows are `stride` apart.
inline void turn_queries_back(const AttentionRope& rope, std::int64_t position, int head_dim,
                              std::int64_t n_rows, std::int64_t stride, const float* q,
                              float* out) {
  const std::int64_t half = rope.half_dim;
  const float* cos = rope.cos + position * half;
  const float* sin = rope.sin + position * half;
  std::int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const V c = load(cos + i);
    const V s = load(sin + i);
    for (std::int64_t at = i; at < n_rows * stride; at += stride) {
      V high = load(q + half + at);
      V low = load(q + at);
      // Turning (high, low) is turning (low, high) back.
      turn(high, low, c, s);
      store(out + at, low);
      store(out + half + at, high);
    }
  }
  for (std::int64_t at = 0; at < n_rows * stride; at += stride) {
    for (std::int64_t j = i; j < half; ++j) {
      const float low = q[at + j];
      const float high = q[at + half + j];
      out[at + j] = low * cos[j] + high * sin[j];
      out[at + half + j] = high * cos[j] - low * sin[j];
    }
    for (std::int64_t j = 2 * half; j < head_dim; ++j) out[at + j] = q[at + j];
  }
}

// V of a block for references and raw blocks of a capacity below 32; those with codes are summed as
// codes.
inline void decode_value(const AttentionTile& tile, const KvBlock& block, std::int64_t value_stride,
                         const BlockScratch& scratch) {
  const std::int64_t d = tile.head_dim;
  if (is_reference_format(block.codec.v)) {
    for (int t = 0; t < kPanelColumns; ++t) {
      if (block.codec.v == KvFormat::kToken) prefetch_token_row(tile, scratch.later_v, false, t);
      reference_row(tile, block, false, t, scratch.v + t * value_stride);
    }
    return;
  }
  const std::int64_t row_bytes = d * (tile.format == ElementFormat::kF32 ? 4 : 2);
  for (std::int64_t t = 0; t < block.capacity; ++t) {
    widen_values(tile.format, block.v.codes + t * row_bytes, d, scratch.v + t * value_stride);
  }
}
