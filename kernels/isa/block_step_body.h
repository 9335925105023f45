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
  const float* less;  // cos - sin, [half][32]
  const float* plus;  // cos + sin
};

// The first stages of the Hadamard transform, of kStages rows each, and the last one with the
// rotation. With kRows = 0 the key is stored, else it is scored in registers: for each query two
// chains, one over each half of the head, that are added at the end.
template <int kStages, int kRows>
void finish_turned(const TurnedKey& key, const float* q, float* scores) {
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
          turn_sums(low[i], high[i], load(key.less + at + i * kPanelColumns),
                    load(key.plus + at + i * kPanelColumns));
          if constexpr (kRows == 0) {
            store(key.k + at + i * kPanelColumns, low[i]);
            store(key.k + n_half + at + i * kPanelColumns, high[i]);
          }
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const float* value = q + r * kQueryStride + row + i;
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

template <int kStages>
void finish_turned(const TurnedKey& key, std::int64_t n_rows, const float* q, float* scores) {
  switch (n_rows) {
    case 1:
      return finish_turned<kStages, 1>(key, q, scores);
    case 2:
      return finish_turned<kStages, 2>(key, q, scores);
    case 4:
      return finish_turned<kStages, 4>(key, q, scores);
    default:
      return finish_turned<kStages, 0>(key, q, scores);
  }
}

// Scores of lloyd K whose rotation is taken with the last stage of the Hadamard transform.
inline void turned_score_step(const AttentionTile& tile, const OnlineSoftmax& state,
                              const AttentionScratch& s, const KvBlock& block, const float* q) {
  const BlockScratch& scratch = s.block;
  const std::int64_t half = tile.rope.half_dim;
  const BlockAngles angles = block_angles(tile, block, true, scratch);
  const TurnedKey key{scratch.k, half, angles.first, angles.second};
  decode_lloyd_by_halves(tile, block, scratch);
  if (tile.head_dim == 32) finish_turned<2>(key, state.n_rows, q, state.scores);
  if (tile.head_dim == 64) finish_turned<4>(key, state.n_rows, q, state.scores);
  if (tile.head_dim >= 128) finish_turned<8>(key, state.n_rows, q, state.scores);
  if (state.n_rows <= 2 || state.n_rows == 4) return;
  // The stored key's halves, as above.
  score_decoded(state, q, scratch.k, half, state.scores);
  score_decoded(state, q + half, scratch.k + half * kPanelColumns, half, s.weights);
  for (std::int64_t i = 0; i < state.n_rows * kPanelColumns; i += kLanes) {
    store(state.scores + i, load(state.scores + i) + load(s.weights + i));
  }
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

// What a block needs, its pieces and rows of tables: too many places for the hardware to foresee.
inline void prefetch_block(const AttentionTile& tile, const KvBlock& block) {
  const std::int64_t d = tile.head_dim;
  const KvFormat k = block.codec.k;
  const KvFormat v = block.codec.v;
  // Raw blocks are prefetched row by row.
  if (k != KvFormat::kRaw) {
    prefetch(block.k.codes, is_reference_format(k) ? 64 : 4 * code_bits(k) * d);
    prefetch(block.k.scales, is_kivi_format(k) ? 4 * d : 64);
  }
  if (v != KvFormat::kRaw && k != KvFormat::kToken) {
    prefetch(block.v.codes, is_reference_format(v) ? 64 : 4 * code_bits(v) * d);
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
  const KvHeadContext& context = *tile.context;
  for (int t = block.first; t < block.end; ++t) {
    if (format == KvFormat::kToken) {
      const std::int64_t row = index_at(block.k.codes, context.wide_ids, t) * context.token_stride;
      prefetch(context.k_tokens + row, 2 * tile.head_dim);
      prefetch(context.v_tokens + row, 2 * tile.head_dim);
    }
    if (turn.by_steps) continue;
    const std::int64_t position = slot_position(tile, block, t);
    prefetch(tile.rope.cos + position * half, row_bytes);
    prefetch(tile.rope.sin + position * half, row_bytes);
  }
  if (!turn.by_steps) return;
  prefetch(tile.rope.cos + turn.position * half, row_bytes);
  prefetch(tile.rope.sin + turn.position * half, row_bytes);
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
  const float* q = s.plain_q;
  if (is_pre_rope_format(format)) {
    const BlockTurn turn = block_turn(tile, block);
    if (turn.by_steps) {
      q = s.turned_q;
      turn_queries_back(tile.rope, turn.position, tile.head_dim, state.n_rows, kQueryStride,
                        s.plain_q, s.turned_q);
    }
  }
  if (is_lloyd_format(format) && is_turned_by_halves(tile)) {
    return turned_score_step(tile, state, s, block, q);
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
void block_steps(const AttentionTile& tile, const OnlineSoftmax& state, const AttentionScratch& s) {
  OnlineSoftmax current = state;
  OnlineSoftmax next = state;
  next.scores = s.next_scores;
  block_scores<Loader>(tile, current, s, tile.blocks[0], 0);
  for (std::int64_t i = 0; i < tile.n_blocks; ++i) {
    const KvBlock& block = tile.blocks[i];
    for (std::int64_t row = 0; row < state.n_rows; ++row) {
      softmax_step(current, row, {block.first, block.end});
    }
    if (i + 3 < tile.n_blocks) prefetch_block(tile, tile.blocks[i + 3]);
    if (i + 2 < tile.n_blocks) prefetch_rows(tile, tile.blocks[i + 2]);
    if (i + 1 < tile.n_blocks) {
      block_scores<Loader>(tile, next, s, tile.blocks[i + 1], ahead(tile, i + 1, true));
    }
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
