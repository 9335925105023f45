#pragma once
// Scores of cached tokens by the attention of the observation window: the last w queries before a
// boundary. Attention itself never shows its probabilities, so they are recomputed here from the
// window's logits, one query head at a time; nothing of size l x l exists.
//
// Columns are cache slots in ascending order of position; the last w columns are the window's own
// tokens. Sources: SnapKV (arXiv 2404.14469), DefensiveKV (arXiv 2510.13334), SimLayerKV
// (arXiv 2410.13846), KeyDiff (arXiv 2504.15364).
//
// A NaN logit makes its row NaN; maxima over rows leave NaN out, means carry it, and the selectors
// (kv_select.h) put it last. No result depends on the number of threads.
//
// Thread-safety: pure functions; a context serves one call at a time.

#include <cstdint>
#include <span>

#include "kernels/attention.h"
#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"
#include "kernels/linear.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

// Causal softmax in place: logits [w, n] of one query head, row j sees columns < n - w + j + 1; the
// others become 0. Sums are in fp64. w <= n; rows may lie apart (one head's of a group's).
void window_softmax(const CpuContext& context, Rows logits);

// Mean (summed in fp64) and maximum over rows of each column. At least one row.
void window_mean(const CpuContext& context, ConstRows p, std::span<float> mean);  // [n]
void window_max(const CpuContext& context, ConstRows p, std::span<float> max);    // [n]

// Share of the mass on the first n_sinks columns and the last `window` ones, of the last row (self
// included, nothing counted twice).
float lazy_mass_decode(ConstRows p, int n_sinks, std::int64_t window);
// Mean over rows of the mass on the first n_sinks columns or at distance 1..window (self excluded).
float lazy_mass_prefill(ConstRows p, int n_sinks, std::int64_t window);

// Mean (or maximum) over the group of each head's column means pooled by 5 (zero padding, divisor
// always 5): the scores of the n - w columns before the window.
enum class GroupReduce : std::uint8_t { kMean, kMax };
void snapkv_scores(ConstRows means,                                           // [group, n]
                   int window, GroupReduce reduce, std::span<float> scores);  // [n - w]

// Negative cosine of each key to the mean direction of all n keys (unit keys averaged): a higher
// score is a key less like the others. Zero for a zero key; a key that is not finite is left out of
// the mean and scores NaN.
void keydiff_scores(const CpuContext& context,
                    ConstRows keys,            // [n, head_dim], as cached
                    std::span<float> scores);  // [n]

// The norm ||W_O,h v_t||_1 averaged over the query heads of each KV head's group.
// v is [n, n_kv_heads * head_dim], `output` the layer's projection [hidden, n_heads * head_dim].
// Tokens go in blocks whose products take at most 1 MiB.
void value_output_norms(const CpuContext& context, const PackedLinear& output, ConstRows v,
                        int n_heads, int n_kv_heads,
                        Rows norms);  // [n_kv_heads, n]
// Divides each token's norms by their sum over the KV heads (zero where that is zero).
void normalize_value_norms(Rows norms);  // [n_kv_heads, n]

// DefensiveKV's worst-case scores of one KV head, before the layer's boost.
struct DefensiveHead {
  // [n - w] max over group and rows of attention pooled by 5 within the context and scaled back to
  // its row's mass there, at least the mean of these maxima, times the value norm.
  std::span<float> score;
  std::span<float> mean;     // [n - w] mean attention over group and rows
  float window_mass = 0.0F;  // mean over group and rows of the mass on the last w columns
};
// p: the group's probabilities, [group * w, n] in any order of rows; norms: [n] normalised over KV
// heads.
void defensive_scores(const CpuContext& context, ConstRows p, int group, int window,
                      std::span<const float> norms, DefensiveHead& head);

// The layer's boost: per head, tokens in descending order of mean attention before the point where
// the normalised cumulative mean reaches 0.9 - window_mass (the layer's: the mean of its heads'),
// at most max_boosted of them, get the layer's highest score plus 1e-3 of their own. Within a head
// the boosted tokens keep their order and stand before all others.
void defensive_boost(std::span<DefensiveHead> heads, std::int64_t max_boosted);

// ---- CUDA bodies: the scores of one layer of one sequence for all its kv heads at once. Device
// memory, aligned to 16 bytes, unless it says host. Slots are the visible tokens of a head, blocks
// first, ascending. Rows of scores and probabilities have the stride score_stride(); what lies past
// a head's last column is neither read nor written.

inline constexpr int kMaxScoreQueries = 64;
inline constexpr int kMaxScoreKvHeads = 128;

struct DeviceScoreLayer {
  const DeviceSequence* sequence = nullptr;  // one entry, device; heads of the layer at
                                             // sequence->heads + layer * n_kv_heads
  int layer = 0;
  AttentionShape shape;           // head_dim 64 or 128, at most kMaxScoreKvHeads
  DeviceKvPool pool;              // f16 or bf16
  DeviceExpandedBlocks expanded;  // pages null: no head has blocks
  std::int64_t n_tokens = 0;      // of the sequence
  int n_queries = 0;              // rows of q: the observation window, <= kMaxScoreQueries
  const F16* q = nullptr;         // [n_queries][n_heads * head_dim], after RoPE
  // Host, [n_kv_heads]: what the store's tables say.
  std::span<const std::int64_t> n_slots;
  std::span<const std::int64_t> tail_first;
};

// Row stride of p and of the score arrays: the largest n_slots, rounded up to 32.
std::int64_t score_stride(std::span<const std::int64_t> n_slots);

// p[(kv_head * group + g) * n_queries + j][slot]: causal softmax of q . k * scale in fp32; 0 where
// query j does not see. Tail slots are visible up to the query's position. Scores are computed
// twice, so that nothing but p is written. At least one query.
void window_probabilities(const CudaContext& context, const DeviceScoreLayer& layer, float scale,
                          std::byte* workspace, std::size_t workspace_bytes,
                          Rows p);  // [n_heads * n_queries, stride]
std::size_t window_probabilities_workspace_bytes(const AttentionShape& shape, int n_queries);

// mean[head][slot] over the window's rows of every query head.
void window_mean(const CudaContext& context, const DeviceScoreLayer& layer, ConstRows p,
                 Rows mean);  // [n_heads, stride]
// lazy_mass_decode (decode true) or lazy_mass_prefill of every query head.
void lazy_mass(const CudaContext& context, const DeviceScoreLayer& layer, ConstRows p, int n_sinks,
               std::int64_t window, bool decode,
               float* mass);  // [n_heads]
// As the CPU body, for every kv head.
void snapkv_scores(const CudaContext& context, const DeviceScoreLayer& layer, ConstRows means,
                   GroupReduce reduce, Rows scores);  // [n_kv_heads, stride]
// Over the tail's keys [tail_first, n_tokens): scores[h][i] is of position tail_first + i.
void keydiff_scores(const CudaContext& context, const DeviceScoreLayer& layer, std::byte* workspace,
                    std::size_t workspace_bytes, Rows scores);  // [n_kv_heads, stride]
std::size_t keydiff_workspace_bytes(const AttentionShape& shape);

// value_output_norms and normalize_value_norms over the tokens [first, n_tokens) of the tails (in
// every head's tail): norms[h][i] of position first + i. `output` is W_O. With f16 pages the
// weights are taken as f16, which holds every bf16 weight between 6e-5 and 65504 exactly; larger
// ones are cut to it.
void value_output_norms(const CudaContext& context, const DeviceScoreLayer& layer,
                        const DeviceLinear& output, std::int64_t first, std::byte* workspace,
                        std::size_t workspace_bytes,
                        Rows norms);  // [n_kv_heads, stride]
std::size_t value_output_norms_workspace_bytes(const AttentionShape& shape, std::int64_t hidden);

// What defensive_scores leaves of one layer. Rows have n_slots - n_queries columns.
struct DeviceDefensive {
  Rows scores;                   // [n_kv_heads, stride]
  Rows means;                    // [n_kv_heads, stride], mean attention
  float* window_mass = nullptr;  // [n_heads * n_queries]
  float* best = nullptr;         // one: the layer's highest score
};
// defensive_scores of every kv head, from the queries: the probabilities are never stored.
// norms[h][i] is of position first_norm + i; slots before it take norm 0 as on the CPU.
void defensive_scores(const CudaContext& context, const DeviceScoreLayer& layer, float scale,
                      ConstRows norms, std::int64_t first_norm, std::byte* workspace,
                      std::size_t workspace_bytes, const DeviceDefensive& out);
std::size_t defensive_workspace_bytes(const AttentionShape& shape, int n_queries);

// defensive_boost of any number of heads of any layers.
struct DeviceBoostHead {
  float* scores = nullptr;
  const float* means = nullptr;
  const float* window_mass = nullptr;  // [n_window_rows], of its layer
  const float* best = nullptr;         // of its layer
  std::int32_t n = 0;
  std::int32_t n_window_rows = 0;
};
void defensive_boost(const CudaContext& context,
                     const DeviceBoostHead* heads,  // device, [n_heads]
                     int n_heads, std::int64_t max_boosted);

}  // namespace spindle::kernels
