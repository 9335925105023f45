#pragma once
// The units of a warp in the kernel of token ids and codebooks, with a stream of rows.

#include <cstdint>

#include "kernels/cuda/decode_queries.cuh"
#include "kernels/cuda/decode_raw.cuh"
#include "kernels/cuda/decode_row_stream.cuh"
#include "kernels/cuda/decode_rows.cuh"
#include "kernels/cuda/decode_team.cuh"

namespace spindle::kernels::device {

// The keys of a unit of rows. Its kinds of angles are compiled apart, as those of levels are.
template <AngleKind kKind, int kPart, typename C>
__device__ void row_key_stages(Softmax<C::kDim>& s, RowStream<C>& stream, std::uint32_t q,
                               const BlockAngles& block, const DecodeCall& call, const Lane& lane) {
  stream.wait();
  row_scores_of_part<kPart, kKind, true>(s, stream.data(), q, block, call, lane);
  stream.template go_on<kPart>();
  if constexpr (kPart + 1 < RowStream<C>::kParts) {
    row_key_stages<kKind, kPart + 1>(s, stream, q, block, call, lane);
  }
}
template <typename C>
__device__ void row_keys(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                         Softmax<C::kDim>& s, RowStream<C>& stream, const Lane& lane) {
  const Stage& unit = stream.unit();
  const std::uint32_t beside = stream.beside();
  const std::uint32_t q = shared_address(shared.q);
  const bool wide_positions = shared.entry.head.wide_positions != 0;
  const bool has_magnitudes = unit.format() == KvFormat::kCodebook;
  stream.wait();
  s.clear_weights();
  BlockAngles block{AngleKind::kSteps, shared_address(&cta.tables.steps), 0, beside, {}};
  if (!unit.is_listed()) {
    row_key_stages<AngleKind::kSteps, 0>(s, stream, q, block, call, lane);
  } else if (!unit.is_partial() && find_listed_steps<C::kDim, C::kStepRows>(
                                       block.at, beside + 4 * C::kDim, wide_positions,
                                       unit.first_position, block.steps, lane)) {
    row_key_stages<AngleKind::kListedSteps, 0>(s, stream, q, block, call, lane);
  } else {
    block = block_angles<C::kDim>(unit, beside, true, wide_positions, block.steps,
                                  shared_address(&cta.tables.strides), 0, call.max_positions, lane);
    row_key_stages<AngleKind::kAny, 0>(s, stream, q, block, call, lane);
  }
  scale_row_scores<true>(s, has_magnitudes ? beside + RowStream<C>::kMagnitudes : 0, lane);
}
template <int kPart, typename C>
__device__ void raw_key_stages(Softmax<C::kDim>& s, RowStream<C>& stream, std::uint32_t q,
                               const Lane& lane) {
  stream.wait();
  raw_scores<C::kDim, C::kBf16>(s, stream.data(), kPart, q, lane);
  stream.template go_on<kPart>();
  if constexpr (kPart + 1 < RowStream<C>::kParts) raw_key_stages<kPart + 1>(s, stream, q, lane);
}

template <int kPart, typename C>
__device__ void row_value_stages(Softmax<C::kDim>& s, RowStream<C>& stream,
                                 const std::uint32_t (&pairs)[4], const Lane& lane) {
  stream.wait();
  row_values_of_part<kPart, C::kDim>(s, stream.data(), pairs, lane);
  stream.template go_on<RowStream<C>::kParts + kPart>();
  if constexpr (kPart + 1 < RowStream<C>::kParts) {
    row_value_stages<kPart + 1>(s, stream, pairs, lane);
  }
}
template <int kPart, typename C>
__device__ void raw_value_stages(Softmax<C::kDim>& s, RowStream<C>& stream,
                                 const std::uint32_t (&pairs)[4], const Lane& lane) {
  stream.wait();
  raw_values_of_part<kPart, C::kDim, C::kBf16>(s, stream.data(), stream.unit(), pairs, lane);
  stream.template go_on<RowStream<C>::kParts + kPart>();
  if constexpr (kPart + 1 < RowStream<C>::kParts) {
    raw_value_stages<kPart + 1>(s, stream, pairs, lane);
  }
}

// The units `first`, first + kWarps .. below `end` of the entry by a warp with a stream of rows.
template <typename C>
__device__ void run_row_stages(Shared<C>& shared, CtaShared<C>& cta, const DecodeCall& call,
                               Softmax<C::kDim>& s, int first, int end) {
  const Lane lane;
  const int warp = Team<C>::warp();
  RowStream<C> stream(call, shared.entry, shared_address(&shared.stream.records[warp]),
                      shared_address(cta.ring(0, warp)), first, end);
  prepare(shared, call);
  while (stream.next()) {
    if (is_row(stream.unit().format())) {
      row_keys(shared, cta, call, s, stream, lane);
    } else {
      raw_key_stages<0>(s, stream, shared_address(shared.q), lane);
    }
    s.template step<false, false>(stream.unit(), lane, call.scale);
    std::uint32_t pairs[4];
    if (is_row(stream.value_format())) {
      const bool has_magnitudes = stream.value_format() == KvFormat::kCodebook;
      pack_row_weights(s.weights,
                       has_magnitudes ? stream.beside() + RowStream<C>::kMagnitudes + 64 : 0, pairs,
                       lane);
      row_value_stages<0>(s, stream, pairs, lane);
    } else {
      pack_weights<C::kBf16>(s.weights, pairs);
      raw_value_stages<0>(s, stream, pairs, lane);
    }
  }
  wait_copies<0>();
  __syncwarp();
}

}  // namespace spindle::kernels::device
