// Sums over the codes of V. Included inside an anonymous namespace by the per-ISA translation
// units, after softmax_body.h and block_body.h.
//
// Codes are multiplied as they are. Scales and minima are per token for int4 and for V of every
// format, so they come in afterwards: into the 32 scores, and into the probabilities before they
// weigh V. What V's minima or means add is the same for all channels of a group (or is known), so
// its weight is summed beside the values and added once per row.

// Everything a call keeps in the scratch memory; dispatch.cc knows how much it is.
struct AttentionScratch {
  float* packed_q;
  float* rotated_q;      // in the Hadamard basis, for int4 K: as rotate_query() leaves them
  float* rotated_sum;    // [n_rows] over the elements of a rotated query
  float* rotated_scale;  // [n_rows]
  float* plain_q;        // [n_rows], kQueryStride apart
  float* turned_q;       // the same, turned back by the positions of a block, [kTurnGroups]
  float* weights;        // [n_rows][32]
  float* next_scores;    // [n_rows][32]
  BlockScratch block;
};

// A row of OnlineSoftmax::values with blocks: the plain basis [value_stride], the rotated one
// [value_stride], then vectors of 16 lanes, of which kLanes are used, to be added up at the end:
// the weight of kivi's minima for each panel, of int4's minima, and the mass of lloyd's mean.
struct ValueRow {
  std::int64_t value_stride;

  std::int64_t n_panels() const { return value_stride / kPanelColumns; }
  std::int64_t kivi(std::int64_t panel) const { return 2 * value_stride + 16 * panel; }
  std::int64_t int4() const { return kivi(n_panels()); }
  std::int64_t lloyd() const { return int4() + 16; }
  std::int64_t size() const { return lloyd() + 16; }
};

// What is summed for one group of channels: codes of panels that share the tokens' scales.
struct ValueGroup {
  const std::uint16_t* scales;  // f16 [32]
  const std::uint16_t* minima;  // f16 [32]; null for lloyd, whose sum is the plain mass
  std::int64_t sum;             // where its lanes lie in the row
  std::int64_t first_panel;
  std::int64_t n_panels;
  std::int64_t values;  // where its first panel lies in the row
};

// Probabilities times scales, and the sum beside them.
inline void weigh_tokens(const OnlineSoftmax& state, const ValueGroup& group, float* weights) {
  constexpr int kVectors = kPanelColumns / kLanes;
  V scale[kVectors];
  V minimum[kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    scale[i] = load_f16(group.scales + i * kLanes);
    minimum[i] = group.minima == nullptr ? splat(1.0F) : load_f16(group.minima + i * kLanes);
  }
  for (std::int64_t row = 0; row < state.n_rows; ++row) {
    const float* p = state.scores + row * kPanelColumns;
    float* lanes = state.values + row * state.row_values + group.sum;
    V sum = load(lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const V mass = load(p + i * kLanes);
      store(weights + row * kPanelColumns + i * kLanes, mass * scale[i]);
      sum = fma(mass, minimum[i], sum);
    }
    store(lanes, sum);
  }
}

template <class Loader>
void add_code_group(const OnlineSoftmax& state, const AttentionScratch& s, const ValueGroup& group,
                    Range tokens, TileOperands<typename Loader::Element> v) {
  weigh_tokens(state, group, s.weights);
  v.b += group.first_panel * v.b_panel;
  add_values<Loader>(state, s.weights, state.values + group.values, {0, state.n_rows}, tokens, v,
                     group.n_panels);
}

// Calls visit(group) for all groups of V; KIVI's are of one panel, the others' of all.
template <class Visit>
void for_value_groups(const OnlineSoftmax& state, const KvBlock& block, const Visit& visit) {
  const ValueRow row{state.value_stride};
  const std::uint16_t* scales = halves(block.v.scales);
  if (is_kivi_format(block.codec.v)) {
    for (std::int64_t panel = 0; panel < row.n_panels(); ++panel) {
      const std::uint16_t* scale = scales + panel * kPanelColumns;
      visit(ValueGroup{scale, scale + state.head_dim, row.kivi(panel), panel, 1,
                       panel * kPanelColumns});
    }
    return;
  }
  const bool lloyd = is_lloyd_format(block.codec.v);
  visit(ValueGroup{scales, lloyd ? nullptr : scales + kPanelColumns,
                   lloyd ? row.lloyd() : row.int4(), 0, row.n_panels(), row.value_stride});
}

template <class Codes>
void value_step(const AttentionTile& tile, const OnlineSoftmax& state, const AttentionScratch& s,
                const KvBlock& block) {
  const std::int64_t d = tile.head_dim;
  const Range tokens{block.first, block.end};
  const int bits = code_bits(block.codec.v);
  const float* table = tile.lloyd_levels + 16 * (bits - 1);
  const std::uint8_t* codes = nibble_plane(bits, block.v.codes, d, s.block.codes);
  if (state.is_short()) {
    TileOperands<std::uint8_t> v{};
    v.b = codes;
    v.b_stride = d / 2;
    v.b_panel = 16;
    v.table = table;
    if (bits == 4) v.prefetch_bytes = s.block.later_v - block.v.codes;
    return for_value_groups(state, block, [&](const ValueGroup& group) {
      add_code_group<Codes>(state, s, group, tokens, v);
    });
  }
  expand_codes<Codes>(table, codes, kPanelColumns, d / kPanelColumns, d, s.block.v);
  TileOperands<float> v{};
  v.b = s.block.v;
  v.b_stride = d;
  v.b_panel = kPanelColumns;
  for_value_groups(state, block, [&](const ValueGroup& group) {
    add_code_group<LoadF32>(state, s, group, tokens, v);
  });
}
