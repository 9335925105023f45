#pragma once
// The one interface between the front end (cluster/api) and the engine (worker/engine): token ids
// in, token events out. It knows nothing of text, sockets or stages, and everything that crosses it
// is a plain value, so that the two sides can live in different processes.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/core/status.h"
#include "kvstore/plan/kv_plan.h"

namespace spindle::engine {

// How to choose tokens; the order in which the parts apply is stated in kernels/sample.h.
// Values are validated by Engine::submit: a request out of range is refused, never clamped.
struct SamplingParams {
  float temperature = 1.0F;  // 0: greedy
  std::int32_t top_k = 0;    // 0: off
  float top_p = 1.0F;
  float min_p = 0.0F;
  float repetition_penalty = 1.0F;
  float presence_penalty = 0.0F;
  float frequency_penalty = 0.0F;
  std::vector<std::pair<std::int32_t, float>> logit_bias;
  // With a seed the output depends on the prompt and these parameters alone; without one (has_seed
  // false) the engine derives a key from its own seed and the request's number.
  bool has_seed = false;
  std::uint64_t seed = 0;
  std::int32_t n_choices = 1;
  std::int32_t max_tokens = 16;  // generated tokens per choice, at least 1
  std::int32_t min_tokens = 0;   // stop tokens cannot be chosen before
  bool ignore_eos = false;
  std::vector<std::int32_t> stop_token_ids;  // beside the model's end-of-sequence ids
  std::int32_t n_logprobs = -1;              // -1: none; k: the chosen token's and the k largest
};

// Prompt tokens at positions [first, end) whose log-probabilities are wanted; first >= 1.
struct PromptScores {
  std::int32_t first = 0;
  std::int32_t end = 0;  // 0: none
  bool dense = false;    // the whole vocabulary's
};

inline constexpr std::int32_t kMinPriority = -100;
inline constexpr std::int32_t kMaxPriority = 100;
inline constexpr std::int64_t kMaxTimeoutUs = 7LL * 24 * 3600 * 1'000'000;

struct EngineRequest {
  std::string request_id;  // for logs only
  // Lower goes first; kMinPriority to kMaxPriority.
  std::int32_t priority = 0;
  // From submit on; later the request ends with DEADLINE_EXCEEDED. 0: none.
  std::int64_t timeout_us = 0;
  std::vector<std::int32_t> prompt_ids;
  // The last of prompt_ids that are output of this request already, when it is computed anew: the
  // cache, the samples and the penalties come out as if it had never been interrupted.
  std::int32_t resumed_tokens = 0;
  SamplingParams sampling;
  kvstore::KvPolicy kv_policy;
  // Prompt lengths at which the KV so far is compressed, ascending; empty: the whole prompt's.
  std::vector<std::int32_t> compress_at;
  // Whose request this is (a hash of the API key, 0 without): owners are served in turn.
  std::uint64_t owner = 0;
  // A kept sequence to continue; it must be of the same owner.
  std::string session_id;
  bool keep_session = false;
  PromptScores prompt_scores;
};

struct PromptScore {
  std::int32_t position = 0;
  float logprob = 0.0F;
  std::int32_t best_id = 0;
  float best_logprob = 0.0F;
  std::vector<float> dense;  // [vocab_size] when asked for
};

enum class FinishReason : std::uint8_t {
  kNone,    // not finished
  kStop,    // an end-of-sequence or stop token, or finish_choice (a stop string)
  kLength,  // max_tokens or the model's context reached
  kCancelled,
  kFailed,
};

struct TokenLogprob {
  std::int32_t id = 0;
  float logprob = 0.0F;
};

// One generated token of one choice. A choice's events come in order; the last has `finish` set.
// When a stop token ends the choice, that token is in the event (is_stop_token) and not output.
struct TokenEvent {
  std::int32_t choice = 0;
  std::int32_t token = 0;
  bool has_logprob = false;
  float logprob = 0.0F;
  std::vector<TokenLogprob> top;  // the most likely tokens, best first
  FinishReason finish = FinishReason::kNone;
  bool is_stop_token = false;
};

struct LayerKvUse {
  std::int32_t layer = 0;
  std::uint64_t full_bytes = 0;
  std::uint64_t kept_bytes = 0;
};

// KV bytes of one request on one stage, summed over its choices when they ended.
struct StageKvUse {
  std::int32_t stage = 0;
  std::uint64_t full_bytes = 0;  // the same tokens uncompressed in 16 bit
  std::uint64_t kept_bytes = 0;  // pages really held
  std::vector<LayerKvUse> layers;
};

// One KV head after a boundary.
struct HeadKvUse {
  std::int32_t layer = 0;
  std::int32_t kv_head = 0;
  std::string plan;  // kvstore::plan_name
  std::int32_t kept_tokens = 0;
  std::uint64_t bytes = 0;
  std::optional<double> lazy_mass;
  std::optional<double> k_entries_per_token;
  std::optional<double> v_entries_per_token;
};

// What the cluster held of a sequence right after a boundary.
struct BoundaryUse {
  std::int32_t position = 0;
  std::uint64_t full_bytes = 0;
  std::uint64_t kept_bytes = 0;
  double compress_ms = 0;  // of the slowest stage
  std::vector<HeadKvUse> heads;
};

struct RequestSummary {
  std::int32_t prompt_tokens = 0;
  std::int32_t completion_tokens = 0;
  double queue_ms = 0;  // submit to first step
  double time_to_first_token_ms = 0;
  double total_ms = 0;
  std::vector<StageKvUse> kv;
  std::int32_t cached_tokens = 0;       // of the prompt, taken from a session
  std::vector<BoundaryUse> boundaries;  // of prompt segments
};

// Receives the events of one request. Called on the engine's thread, in order, never concurrently,
// never from inside submit(); implementations hand over to their own executor and return at once.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void on_tokens(std::span<const TokenEvent> events) = 0;
  // Before the first token, in order of position; only when prompt_scores were asked for.
  virtual void on_prompt_scores(std::span<const PromptScore> scores) { (void)scores; }
  // Exactly once per accepted request, after its last event. `status` is OK, CANCELLED, or why the
  // request failed.
  virtual void on_end(const Status& status, const RequestSummary& summary) = 0;
};

// The forms in which KV bytes lie in memory, as kvstore::KvForm orders them.
inline constexpr std::size_t kKvForms = 7;
inline constexpr std::array<std::string_view, kKvForms> kKvFormNames{
    "raw", "window", "int4", "kivi", "lloyd", "codebook", "token"};

// What one layer holds of all sequences.
struct LayerState {
  std::int32_t layer = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t full_bytes = 0;  // the same logical tokens uncompressed in 16 bit
  std::string plan;              // that most of the bytes are under; "" when nothing is held
  std::int64_t logical_tokens = 0;
  std::int64_t retained_tokens = 0;  // mean over the KV heads
};

// Time that a stage could not compute while the cluster had requests.
struct BubbleSeconds {
  double empty = 0;       // no step plan waited for it
  double upstream = 0;    // it had a plan and waited for activations
  double downstream = 0;  // it had activations to send and the next stage took none
};

struct StageState {
  std::int32_t stage = 0;
  std::string host;
  std::string device;
  std::int32_t first_layer = 0;
  std::int32_t n_layers = 0;
  std::uint64_t weight_bytes = 0;
  std::uint64_t kv_capacity_bytes = 0;
  std::uint64_t kv_used_bytes = 0;
  std::uint64_t kv_peak_bytes = 0;
  std::uint64_t kv_committed_bytes = 0;  // promised by the ledger
  // That the balancer plans for the requests that should run together, at the stage's present
  // level; the capacity without a balancer.
  std::uint64_t kv_budget_bytes = 0;
  // Size, as a share of the uncompressed bytes, that its layers are planned for at present where a
  // request asked for none, and the price of its bytes; 0 without a balancer.
  double kv_level_ratio = 0;
  double kv_price = 0;
  std::uint64_t kv_moves_stronger = 0;  // of its level
  std::uint64_t kv_moves_lighter = 0;
  // Layers and forms are of one moment, at most some steps ago; layers is empty before the first.
  std::vector<LayerState> layers;
  std::array<std::uint64_t, kKvForms> kv_form_bytes = {};  // their sum is that of the layers
  std::uint64_t steps = 0;
  double busy_seconds = 0;  // computing
  BubbleSeconds bubble;
  double compress_seconds = 0;  // scoring and carrying out boundaries
  // Moving activations from the moment that the other side was there.
  double send_seconds = 0;
  double receive_seconds = 0;
  double report_age_seconds = 0;  // since its last report, or since the start
};

// Tokens of a step, counted into buckets of these upper bounds and one beyond them.
inline constexpr std::array<std::int32_t, 13> kStepTokenBounds{
    1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
struct StepTokens {
  std::array<std::uint64_t, kStepTokenBounds.size() + 1> counts = {};  // not cumulative
  std::uint64_t sum = 0;
};

// A snapshot. accepted = finished + failed + cancelled + running + waiting, always.
struct EngineStats {
  std::int32_t running = 0;
  std::int32_t waiting = 0;
  std::int64_t waiting_prompt_tokens = 0;
  std::uint64_t accepted = 0;
  std::uint64_t finished = 0;
  std::uint64_t failed = 0;
  std::uint64_t cancelled = 0;
  std::uint64_t refused = 0;
  std::uint64_t expired = 0;      // of those failed: their time was up
  std::uint64_t preemptions = 0;  // a running request gave its KV to another and waits again
  std::uint64_t recomputed_tokens = 0;
  std::uint64_t prompt_tokens = 0;  // prefilled, also those computed anew
  // Of the prompts whose first token was sampled, each once.
  std::uint64_t completed_prompt_tokens = 0;
  std::uint64_t generation_tokens = 0;  // sampled
  std::uint64_t steps = 0;
  StepTokens step_tokens;
  std::int32_t max_num_seqs = 0;
  std::int32_t micro_batches_in_flight = 0;
  bool balances = false;            // whether there is a balancer
  std::uint64_t budget_plans = 0;   // the balancer's decisions
  std::uint64_t budget_rounds = 0;  // reports that it looked at
  double budget_seconds = 0;        // that it took for them
  double wanted_requests = 0;       // that should run together, by the balancer
  double fitting_requests = 0;      // of those, how many fit
  bool draining = false;
  std::vector<StageState> stages;
};

// A stage's KV level that the balancer moved.
struct BudgetMove {
  std::int64_t unix_ms = 0;
  std::uint64_t step = 0;  // from which on it is in effect
  std::int32_t stage = 0;
  double from_ratio = 0;  // StageState::kv_level_ratio
  double to_ratio = 0;
  std::string reason;
};
inline constexpr std::size_t kMaxBudgetMoves = 64;

// An accepted request that has not ended.
struct ActiveRequest {
  std::uint64_t handle = 0;
  bool running = false;
  std::int32_t priority = 0;
  std::int32_t prompt_tokens = 0;
  std::int32_t prefilled_tokens = 0;  // of the prompt, and of its output when it is computed anew
  std::int32_t generated_tokens = 0;  // of all choices
  std::int32_t max_tokens = 0;        // that all choices may come to
  std::int64_t age_us = 0;            // since submit
  std::string policy;                 // profile, and its size where the request asked for one
};
inline constexpr std::size_t kMaxActiveRequests = 200;

// Everything to look at, of one moment.
struct EngineSnapshot {
  EngineStats stats;
  std::vector<BudgetMove> moves;               // the newest last, at most kMaxBudgetMoves
  std::vector<ActiveRequest> active_requests;  // running first, at most kMaxActiveRequests
  std::int64_t n_active_requests = 0;
};

struct EngineLimits {
  std::int32_t vocab_size = 0;
  std::int32_t max_model_len = 0;  // prompt + output
  std::int32_t max_n = 16;
  std::int32_t max_logprobs = 20;
  std::int32_t max_logit_bias = 1024;
};

using RequestHandle = std::uint64_t;

// Thread-safety: every member may be called from any thread.
class Engine {
 public:
  virtual ~Engine() = default;

  // Queues a request. INVALID_ARGUMENT names the field at fault; RESOURCE_EXHAUSTED when the queue
  // is full; UNAVAILABLE when draining or stopped. The sink is held until on_end returned.
  virtual Result<RequestHandle> submit(EngineRequest request, std::shared_ptr<EventSink> sink) = 0;

  // Ends a request early; on_end follows with CANCELLED. False, and nothing happens, for unknown
  // and ended handles.
  virtual bool cancel(RequestHandle handle) = 0;

  // Ends one choice early as kStop (its stop string was seen). No event follows for that choice.
  virtual void finish_choice(RequestHandle handle, std::int32_t choice) = 0;

  virtual EngineStats stats() const = 0;
  // Work in proportion to the requests: for people and dashboards, not for every request.
  virtual EngineSnapshot snapshot() const = 0;
  virtual const EngineLimits& limits() const = 0;

  // Cheap test before tokenising: OK, or why a request would be refused right now.
  virtual Status admission() const = 0;
};

}  // namespace spindle::engine
