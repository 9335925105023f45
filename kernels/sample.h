#pragma once
// From one row of logits to one token. Pure: the result depends only on the arguments, ties go to
// the lower id everywhere, and the random number is a function of (seed, request, choice,
// position).
//
// Order: repetition penalty, presence and frequency penalty, bias, mask, then either argmax or
// temperature, top_k, top_p, min_p and a draw. Log-probabilities are those of the raw logits,
// before any of it.
//
// Thread-safety: functions are pure; a SampleWorkspace serves one call at a time.

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

struct SampleParams {
  float temperature = 1.0F;  // 0 is greedy: argmax after penalties, bias and mask
  std::int32_t top_k = 0;    // <= 0: off
  float top_p = 1.0F;        // in (0, 1]; keeps the fewest tokens whose mass reaches it
  float min_p = 0.0F;        // in [0, 1]; drops tokens below min_p times the best one's probability
  float repetition_penalty = 1.0F;  // > 0; prompt and output ids: logit > 0 ? l / p : l * p
  float presence_penalty = 0.0F;    // subtracted once for an id in the output
  float frequency_penalty = 0.0F;   // subtracted once per occurrence in the output
};

struct LogitBias {
  std::int32_t id = 0;
  float bias = 0.0F;
};

// Names one random number. The same four values give the same number on every rank and every run.
struct SampleKey {
  std::uint64_t seed = 0;
  std::uint64_t request = 0;
  std::uint32_t choice = 0;    // the n-th of the request's parallel completions
  std::uint32_t position = 0;  // of the token being drawn
};

// A double in [0, 1).
double sample_uniform(const SampleKey& key);

// Ids outside [0, n_vocab) in any of the lists are ignored.
struct SampleHistory {
  std::span<const std::int32_t> prompt_ids;
  std::span<const std::int32_t> output_ids;
  std::span<const LogitBias> logit_bias;
  std::span<const std::int32_t> banned_ids;  // forced to probability 0 (min_tokens, disallowed)
};

struct TokenLogprob {
  std::int32_t id = 0;
  float logprob = 0.0F;
};

// Memory for one call, reused between calls; it grows to the vocabulary once.
class SampleWorkspace {
 public:
  struct Candidate {
    float logit;
    std::int32_t id;
  };

  // Views of `n` elements; contents are whatever the last user left.
  std::span<float> logits(std::size_t n);
  std::span<float> weights(std::size_t n);
  std::span<float> ranked_weights(std::size_t n);
  std::span<float> block_maxima(std::size_t n);
  std::span<Candidate> candidates(std::size_t n);
  // All zero between calls: whoever writes an entry sets it back to zero.
  std::span<std::int32_t> counts(std::size_t n);

 private:
  std::vector<float> logits_;
  std::vector<float> weights_;
  std::vector<float> ranked_weights_;
  std::vector<float> block_maxima_;
  std::vector<Candidate> candidates_;
  std::vector<std::int32_t> counts_;
};

// Steps, each in place on logits [n_vocab].
void apply_penalties(std::span<float> logits, const SampleParams& params,
                     const SampleHistory& history, SampleWorkspace& workspace);
void apply_bias(std::span<float> logits, std::span<const LogitBias> bias);
void apply_mask(std::span<float> logits, std::span<const std::int32_t> banned_ids);

// The index of the largest value, the lowest on ties. A NaN never wins; -1 when nothing is greater
// than minus infinity.
std::int32_t argmax(const CpuContext& context, std::span<const float> logits);

// The token drawn with the number `uniform` in [0, 1) from logits that are already penalised.
// -1 when a logit is NaN or all are masked: the caller fails the request. `logits` may be
// workspace.logits(), no other view of it.
std::int32_t draw(const CpuContext& context, std::span<const float> logits,
                  const SampleParams& params, double uniform, SampleWorkspace& workspace);

// All of the above on a row that is left unchanged. -1 as in draw.
std::int32_t sample(const CpuContext& context, std::span<const float> logits,
                    const SampleParams& params, const SampleHistory& history, const SampleKey& key,
                    SampleWorkspace& workspace);

// log(sum(exp(logits))), NaN if a logit is: one fixed reduction order for a vocabulary size.
float log_sum_exp(const CpuContext& context, std::span<const float> logits);

// logprob = logits[id] - log_sum_exp(logits) of the raw row, for each of `ids`.
void log_softmax_at(const CpuContext& context, std::span<const float> logits,
                    std::span<const std::int32_t> ids, std::span<TokenLogprob> out);

// The best `out.size()` tokens of the raw row, best first, ties to the lower id. Returns how many
// were written: fewer only when the row has fewer tokens that are not NaN.
std::size_t top_logprobs(const CpuContext& context, std::span<const float> logits,
                         std::span<TokenLogprob> out, SampleWorkspace& workspace);

// ---- CUDA body. One step's rows at once; device memory. Same order of steps, same random numbers.

// One row to sample. Lists lie in common device arrays.
struct DeviceSampleRow {
  SampleParams params;
  double uniform = 0;           // sample_uniform of the row's key
  std::int32_t logits_row = 0;  // several rows may sample from one row of logits
  std::int32_t first_adjust = 0;
  std::int32_t n_adjust = 0;
};
// What the lists of a SampleHistory come to for one id: its part in each penalty, its bias. An id
// appears once in a row's list.
struct DeviceSampleAdjust {
  std::int32_t id = 0;
  std::int32_t n_output = 0;  // occurrences in the output
  float bias = 0;
  std::uint8_t seen = 0;  // in prompt or output
  std::uint8_t banned = 0;
  std::uint8_t reserved[2] = {};
};
struct DeviceSampled {
  std::int32_t token = 0;  // -1 as in draw
  std::int32_t reserved = 0;
};
std::size_t sample_workspace_bytes(int max_rows, std::int64_t n_vocab);
// Leaves the logits unchanged. n_vocab is at most 2^19; `rows`, `adjusts` and `sampled` are device
// memory. The token is the CPU's unless `uniform` is within 1e-5 of where two tokens meet or the
// limits of two tokens are that close; it does not depend on the other rows.
void sample(const CudaContext& context, ConstRows logits,  // [n, n_vocab]
            const DeviceSampleRow* rows, int n_rows, const DeviceSampleAdjust* adjusts,
            std::byte* workspace, std::size_t workspace_bytes,
            DeviceSampled* sampled);  // [n_rows]

}  // namespace spindle::kernels
