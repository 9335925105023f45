// The steps of compressed blocks in the online softmax. Included inside an anonymous namespace by
// the per-ISA translation units, after the bodies of codes.

// Raw blocks of 32 tokens lie as the pages of the tail do.
template <class Loader>
void raw_value_step(const AttentionTile& tile, const OnlineSoftmax& state,
                    const AttentionScratch& s, const KvBlock& block, std::int64_t prefetch_bytes) {
  const auto* v = reinterpret_cast<const typename Loader::Element*>(block.v.codes);
  const Range rows{0, state.n_rows};
  const Range tokens{block.first, block.end};
  if (state.is_short() && tile.head_dim % kPanelColumns == 0) {
    return value_block<Loader>(state, rows, tokens, v, tile.head_dim, prefetch_bytes);
  }
  expand_values<Loader>(v, tile.head_dim, state.value_stride, s.block.v);
  value_block<LoadF32>(state, rows, tokens, s.block.v, state.value_stride, 0);
}

template <class Loader>
void raw_score_step(const AttentionTile& tile, const OnlineSoftmax& state,
                    const AttentionScratch& s, const std::byte* codes,
                    std::int64_t prefetch_bytes) {
  const auto* k = reinterpret_cast<const typename Loader::Element*>(codes);
  if (state.is_short()) return score_block<Loader>(state, 0, k, prefetch_bytes);
  expand_panel<Loader>(k, tile.head_dim, s.block.k);
  score_block<LoadF32>(state, 0, s.block.k, 0);
}

// What finish_turned() works on.
struct TurnedKey {
  float* k;  // [2 * half][32]
  std::int64_t half;
  const float* less;          // cos - sin, [half][32]
  const float* plus;          // cos + sin
  const std::int32_t* steps;  // with kNear: of which step in a row [32], for each token
};

// Queries turned back, rows kQueryStride apart.
struct TurnedQueries {
  const float* q;
  std::int64_t group_stride;  // from those of one group of tokens to the next's; 0 for the same

  const float* of_column(std::int64_t column) const {
    return q + column / (kPanelColumns / kTurnGroups) * group_stride;
  }
};

// The first stages of the Hadamard transform, of kStages rows each, and the last one with the
// rotation. With kRows = 0 the key is stored, else it is scored in registers: for each query two
// chains, one over each half of the head, that are added at the end.
template <int kStages, int kRows, bool kNear>
__attribute__((noinline)) void finish_turned(const TurnedKey& key, const TurnedQueries& queries,
                                             float* scores) {
  constexpr int kVectors = kVectorRegisters == 32 ? 2 : 1;
  constexpr int kChains = kRows == 0 ? 1 : kRows;
  const std::int64_t n_half = key.half * kPanelColumns;
  for (int c = 0; c < kPanelColumns; c += kVectors * kLanes) {
    V low_sum[kChains][kVectors];
    V high_sum[kChains][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kChains * kVectors; ++r) {
      low_sum[r / kVectors][r % kVectors] = splat(0.0F);
      high_sum[r / kVectors][r % kVectors] = splat(0.0F);
    }
    for (std::int64_t row = 0; row < key.half; row += kStages) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t at = row * kPanelColumns + c + v * kLanes;
        V low[kStages];
        V high[kStages];
#pragma GCC unroll 8
        for (int i = 0; i < kStages; ++i) {
          low[i] = load(key.k + at + i * kPanelColumns);
          high[i] = load(key.k + n_half + at + i * kPanelColumns);
        }
        butterflies<kStages>(low);
        butterflies<kStages>(high);
#pragma GCC unroll 8
        for (int i = 0; i < kStages; ++i) {
          if constexpr (kNear) {
            const std::int64_t angles = (row + i) * kPanelColumns;
            const std::int32_t* steps = key.steps + c + v * kLanes;
            turn_sums(low[i], high[i], near_angles(key.less + angles, steps),
                      near_angles(key.plus + angles, steps));
          } else {
            turn_sums(low[i], high[i], load(key.less + at + i * kPanelColumns),
                      load(key.plus + at + i * kPanelColumns));
          }
          if constexpr (kRows == 0) {
            store(key.k + at + i * kPanelColumns, low[i]);
            store(key.k + n_half + at + i * kPanelColumns, high[i]);
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const float* value = queries.of_column(c + v * kLanes) + r * kQueryStride + row + i;
            low_sum[r][v] = fma(splat(value[0]), low[i], low_sum[r][v]);
            high_sum[r][v] = fma(splat(value[key.half]), high[i], high_sum[r][v]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        store(scores + r * kPanelColumns + c + v * kLanes, low_sum[r][v] + high_sum[r][v]);
      }
    }
  }
}

template <int kStages, bool kNear>
void finish_turned(const TurnedKey& key, std::int64_t n_rows, const TurnedQueries& queries,
                   float* scores) {
  switch (n_rows) {
    case 1:
      return finish_turned<kStages, 1, kNear>(key, queries, scores);
    case 2:
      return finish_turned<kStages, 2, kNear>(key, queries, scores);
    case 4:
      return finish_turned<kStages, 4, kNear>(key, queries, scores);
    default:
      return finish_turned<kStages, 0, kNear>(key, queries, scores);
  }
}

template <bool kNear>
void finish_turned(const AttentionTile& tile, const TurnedKey& key, std::int64_t n_rows,
                   const TurnedQueries& queries, float* scores) {
  if (tile.head_dim == 32) finish_turned<2, kNear>(key, n_rows, queries, scores);
  if (tile.head_dim == 64) finish_turned<4, kNear>(key, n_rows, queries, scores);
  if (tile.head_dim >= 128) finish_turned<8, kNear>(key, n_rows, queries, scores);
}

// Scores of kRows rows on the stored key, the chains of finish_turned().
template <int kRows>
void score_turned(const TurnedKey& key, const TurnedQueries& queries, std::int64_t first_row,
                  float* scores) {
  for (int c = 0; c < kPanelColumns; c += kLanes) {
    const float* q = queries.of_column(c) + first_row * kQueryStride;
    const float* k = key.k + c;
    V low_sum[kRows];
    V high_sum[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) low_sum[r] = high_sum[r] = splat(0.0F);
    for (std::int64_t i = 0; i < key.half; ++i) {
      const V low = load(k + i * kPanelColumns);
      const V high = load(k + (key.half + i) * kPanelColumns);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        low_sum[r] = fma(splat(q[r * kQueryStride + i]), low, low_sum[r]);
        high_sum[r] = fma(splat(q[r * kQueryStride + key.half + i]), high, high_sum[r]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      store(scores + (first_row + r) * kPanelColumns + c, low_sum[r] + high_sum[r]);
    }
  }
}

// Scores of lloyd K whose rotation is taken with the last stage of the Hadamard transform.
inline void turned_score_step(const AttentionTile& tile, const OnlineSoftmax& state,
                              const AttentionScratch& s, const KvBlock& block) {
  constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;
  std::int32_t steps[kPanelColumns];
  const GroupTurns turns = group_turns(tile, block, s.block, steps);
  const std::int64_t group_stride = state.n_rows * kQueryStride;
  for (int group = 0; group < turns.n_groups; ++group) {
    turn_queries_back(tile.rope, turns.positions[group], tile.head_dim, state.n_rows, kQueryStride,
                      s.plain_q, s.turned_q + group * group_stride);
  }
  const TurnedQueries queries{turns.n_groups == 0 ? s.plain_q : s.turned_q,
                              turns.n_groups > 1 ? group_stride : 0};
  const TurnedKey key{s.block.k, tile.rope.half_dim, turns.angles.first, turns.angles.second,
                      turns.near_steps};
  decode_lloyd_by_halves(tile, block, s.block);
  if (turns.near_steps != nullptr) {
    finish_turned<kTurnGroups != 1>(tile, key, state.n_rows, queries, state.scores);
  } else {
    finish_turned<false>(tile, key, state.n_rows, queries, state.scores);
  }
  if (state.n_rows <= 2 || state.n_rows == 4) return;
  std::int64_t row = 0;
  for (; row + kRows <= state.n_rows; row += kRows) {
    score_turned<kRows>(key, queries, row, state.scores);
  }
  for (; row + 2 <= state.n_rows; row += 2) score_turned<2>(key, queries, row, state.scores);
  if (row < state.n_rows) score_turned<1>(key, queries, row, state.scores);
}

// Blocks of one format come in runs: bytes from a raw one to the next, which is fetched while the
// first is used.
inline std::int64_t ahead(const AttentionTile& tile, std::int64_t index, bool is_key) {
  if (index + 1 >= tile.n_blocks) return 0;
  const KvBlock& block = tile.blocks[index];
  const KvBlock& next = tile.blocks[index + 1];
  if (is_key) return next.codec.k == block.codec.k ? next.k.codes - block.k.codes : 0;
  return next.codec.v == block.codec.v ? next.v.codes - block.v.codes : 0;
}

// Into the L2 cache, which takes more requests at a time than the L1 cache.
inline void prefetch(const void* begin, std::int64_t n_bytes) {
  const auto* p = static_cast<const char*>(begin);
  for (std::int64_t i = 0; i < n_bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// Whether a side's codes are fetched a line at a time while an earlier block's are used: many
// requests at once would wait for each other. Raw blocks are fetched row by row.
constexpr bool is_fetched_by_lines(KvFormat format, bool is_key) {
  if (is_key) return format == KvFormat::kInt4 || is_lloyd_format(format);
  return code_bits(format) == 4;
}

// Blocks from one whose side is used to the one that is fetched meanwhile.
constexpr std::int64_t kBlocksAhead = 3;

// Codes of the block to fetch while block `index` is used. Of token ids, whose block brings its
// rows, the next block's.
inline const std::byte* later_codes(const AttentionTile& tile, std::int64_t index, bool is_key) {
  const KvBlock& block = tile.blocks[index];
  const bool is_token = block.codec.k == KvFormat::kToken;
  const std::int64_t place = index + (is_token ? 1 : kBlocksAhead);
  const KvBlock& later = tile.blocks[place < tile.n_blocks ? place : index];
  if (is_key || is_token) return later.codec.k == block.codec.k ? later.k.codes : block.k.codes;
  return later.codec.v == block.codec.v ? later.v.codes : block.v.codes;
}

// What a block needs, its pieces and rows of tables: too many places for the hardware to foresee.
inline void prefetch_block(const AttentionTile& tile, std::int64_t index) {
  const std::int64_t d = tile.head_dim;
  const KvBlock& block = tile.blocks[index];
  const KvCodec before = tile.blocks[index - kBlocksAhead].codec;
  const KvFormat k = block.codec.k;
  const KvFormat v = block.codec.v;
  if (k != KvFormat::kRaw) {
    if (k != before.k || !is_fetched_by_lines(k, true)) {
      prefetch(block.k.codes, is_reference_format(k) ? 64 : 4 * code_bits(k) * d);
    }
    prefetch(block.k.scales, is_kivi_format(k) ? 4 * d : 64);
  }
  if (v != KvFormat::kRaw && k != KvFormat::kToken) {
    if (v != before.v || !is_fetched_by_lines(v, false)) {
      prefetch(block.v.codes, is_reference_format(v) ? 64 : 4 * code_bits(v) * d);
    }
    prefetch(block.v.scales, is_kivi_format(v) ? 4 * d : 64);
  }
}

// Rows of tables that a block refers to.
inline void prefetch_rows(const AttentionTile& tile, const KvBlock& block) {
  const KvFormat format = block.codec.k;
  if (!is_pre_rope_format(format)) return;
  const std::int64_t half = tile.rope.half_dim;
  const std::int64_t row_bytes = half * static_cast<std::int64_t>(sizeof(float));
  const BlockTurn turn = block_turn(tile, block);
  if (!turn.by_steps) {
    for (int t = block.first; t < block.end; ++t) {
      const std::int64_t position = slot_position(tile, block, t);
      prefetch(tile.rope.cos + position * half, row_bytes);
      prefetch(tile.rope.sin + position * half, row_bytes);
    }
    return;
  }
  const auto fetch = [&](std::int64_t position) {
    for (std::int64_t i = 0; i < half; i += 16) {
      prefetch_line(tile.rope.cos + position * half + i);
      prefetch_line(tile.rope.sin + position * half + i);
    }
  };
  fetch(turn.position);
  if (kTurnGroups == 1 || block.positions == nullptr) return;
  fetch(slot_position(tile, block, kPanelColumns / kTurnGroups));
}

// Scores of one block.
template <class Loader>
void block_scores(const AttentionTile& tile, const OnlineSoftmax& state, const AttentionScratch& s,
                  const KvBlock& block, std::int64_t prefetch_bytes) {
  const KvFormat format = block.codec.k;
  if (format == KvFormat::kInt4) return score_codes(tile, state, s, block);
  if (format == KvFormat::kRaw && block.capacity == kPanelColumns) {
    return raw_score_step<Loader>(tile, state, s, block.k.codes, prefetch_bytes);
  }
  if (is_lloyd_format(format) && is_turned_by_halves(tile)) {
    return turned_score_step(tile, state, s, block);
  }
  const float* q = s.plain_q;
  if (is_pre_rope_format(format)) {
    const BlockTurn turn = block_turn(tile, block);
    if (turn.by_steps) {
      q = s.turned_q;
      turn_queries_back(tile.rope, turn.position, tile.head_dim, state.n_rows, kQueryStride,
                        s.plain_q, s.turned_q);
    }
  }
  decode_key(tile, block, s.block);
  score_decoded(state, q, s.block.k, tile.head_dim, state.scores);
}

// What the block's probabilities add to the values.
template <class Loader>
void block_values(const AttentionTile& tile, const OnlineSoftmax& state, const AttentionScratch& s,
                  const KvBlock& block, std::int64_t prefetch_bytes) {
  const KvFormat format = block.codec.v;
  if (is_lloyd_format(format)) return value_step<LoadLevels>(tile, state, s, block);
  if (format == KvFormat::kRaw && block.capacity == kPanelColumns) {
    return raw_value_step<Loader>(tile, state, s, block, prefetch_bytes);
  }
  if (format != KvFormat::kRaw && !is_reference_format(format)) {
    return sum_codes(tile, state, s, block);
  }
  decode_value(tile, block, state.value_stride, s.block);
  value_block<LoadF32>(state, {0, state.n_rows}, {block.first, block.end}, s.block.v,
                       state.value_stride, 0);
}

// The steps of all blocks; every query sees their tokens [first, end). The scores of the next block
// are computed between a block's softmax and its values, so that the one's latency is spent on the
// other.
template <class Loader>
void block_steps(const AttentionTile& tile, const OnlineSoftmax& state,
                 const AttentionScratch& scratch) {
  AttentionScratch s = scratch;
  OnlineSoftmax current = state;
  OnlineSoftmax next = state;
  next.scores = s.next_scores;
  s.block.later_k = later_codes(tile, 0, true);
  block_scores<Loader>(tile, current, s, tile.blocks[0], 0);
  for (std::int64_t i = 0; i < tile.n_blocks; ++i) {
    const KvBlock& block = tile.blocks[i];
    for (std::int64_t row = 0; row < state.n_rows; ++row) {
      softmax_step(current, row, {block.first, block.end});
    }
    if (i + kBlocksAhead < tile.n_blocks) prefetch_block(tile, i + kBlocksAhead);
    if (i + 2 < tile.n_blocks) prefetch_rows(tile, tile.blocks[i + 2]);
    if (i + 1 < tile.n_blocks) {
      s.block.later_k = later_codes(tile, i + 1, true);
      block_scores<Loader>(tile, next, s, tile.blocks[i + 1], ahead(tile, i + 1, true));
    }
    s.block.later_v = later_codes(tile, i, false);
    block_values<Loader>(tile, current, s, block, ahead(tile, i, false));
    float* scores = current.scores;
    current.scores = next.scores;
    next.scores = scores;
  }
}

// Brings what blocks added into the plain basis.
inline void finish_values(const AttentionTile& tile, const OnlineSoftmax& state,
                          const AttentionScratch& s, float* values) {
  const ValueRow row{state.value_stride};
  const std::int64_t d = tile.head_dim;
  float* rotated = values + state.value_stride;
  const float minima = sum_lanes(load(values + row.int4()));
  for (std::int64_t i = 0; i < d; ++i) rotated[i] += minima;
  hadamard_vector(rotated, d);
  for (std::int64_t i = 0; i < d; ++i) values[i] += rotated[i];
  for (std::int64_t panel = 0; panel < row.n_panels(); ++panel) {
    const float sum = sum_lanes(load(values + row.kivi(panel)));
    for (int i = 0; i < kPanelColumns; ++i) values[panel * kPanelColumns + i] += sum;
  }
  if (tile.context->v_mean == nullptr) return;
  float* mean = s.block.rows;
  widen_halves(tile.context->v_mean, d, mean);
  const float mass = sum_lanes(load(values + row.lloyd()));
  for (std::int64_t i = 0; i < d; ++i) values[i] += mean[i] * mass;
}
