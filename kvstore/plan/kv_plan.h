#pragma once
// What a sequence keeps of its KV, decided head by head. A policy is what a request asks for; at
// each boundary (the end of a prompt segment) rank 0 turns it into one plan for every (layer, KV
// head) of the whole model, and the stages carry it out (kv_store.h). Pure functions, so that the
// plan is the same for any number of stages.
//
// Thread-safety: plain values and pure functions.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/dtype.h"
#include "kernels/core/status.h"
#include "kernels/kv_block.h"
#include "kernels/kv_select.h"

namespace spindle::kvstore {

// The whole model's KV, not a stage's.
struct KvModel {
  int n_layers = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF16;
  int vocab_size = 0;
  std::int64_t max_model_len = 0;
  // Layer 0's K and V of every id lie in a table (KvFormat::kToken). Without it a request that
  // holds token ids keeps a table of its own ids (kvstore/token_book.h).
  bool token_table = true;

  int n_tables() const { return n_layers * n_kv_heads; }
  bool wide_positions() const { return max_model_len > 65536; }
  bool wide_ids() const { return vocab_size > 65536; }
};

enum class KvProfile : std::uint8_t {
  kFull,
  kSpindle,
  kSpindleKv,
  kSimLayerKv,
  kSimLayerKvInt4,
  kSnapKv,
  kPyramidKv,
  kStreaming,
  kKeyDiff,
  kDefensive,  // global, in int4
  kInt4,
  kKivi4,
  kKivi2,
};
std::string_view format_name(kernels::KvFormat format);  // "raw", "lloyd4", "token", ...
std::string_view profile_name(KvProfile profile);        // "full", "spindle", "spindlekv", ...
std::optional<KvProfile> parse_profile(std::string_view name);
std::vector<KvProfile> all_profiles();

// "int4" is for keys and values, "lloyd3/lloyd2" for keys / values; "token" is for both or none.
std::optional<kernels::KvCodec> parse_codec(std::string_view name);
std::string codec_names();  // what parse_codec takes, for messages

enum class KvMode : std::uint8_t { kFull, kEvict, kStream };

enum class KvSelector : std::uint8_t {
  kNone,
  kSnapKvMean,
  kSnapKvMax,
  kSpindleKv,  // n_keep is per query head, the KV head keeps the union
  kDefensive,
  kKeyDiff,
};

// Variants of the lazy test (SimLayerKV).
enum class LazyTest : std::uint8_t { kDecode, kPrefill };

inline constexpr int kObservationWindow = 32;
inline constexpr int kGeneratedBoundary = 64;  // generated tokens from one boundary to the next
inline constexpr int kMaxSinks = 64;
inline constexpr int kMaxRecent = 4096;
inline constexpr std::int64_t kDefaultLazyWindow = 1024;
// Prompts of at most this many tokens beside the sinks are never compressed.
inline constexpr int kUncompressedTokens = kObservationWindow + 64;
// Ids of a request's own table: references to them are 16 bits.
inline constexpr std::int64_t kMaxTokenEntries = 65536;
// What packing pieces into pages may waste; left free in every budget, for any number of stages.
inline constexpr int kAllowancePages = 2;

// Settings of one (layer, KV head) range that replace what the profile decided; later ranges win.
// keep_ratio implies EVICT and window implies STREAM; kToken is for complete heads of layer 0.
struct HeadOverride {
  int first_layer = 0;
  int last_layer = 0;  // inclusive
  int kv_head = -1;    // -1: all
  std::optional<KvMode> mode = std::nullopt;
  std::optional<KvSelector> selector = std::nullopt;
  std::optional<kernels::KvCodec> codec = std::nullopt;
  std::optional<double> keep_ratio = std::nullopt;    // of the context, EVICT
  std::optional<std::int64_t> window = std::nullopt;  // STREAM
};

// What a request asks for, after defaults. `ratio` is of the uncompressed 16-bit bytes of the
// tokens at the boundary; `max_bytes` is the same as an absolute figure; 0 means the profile's own
// size, and at most one is set. The profile's own size grows for prompts that are too short for it,
// as does any size with `best_effort`; a size asked for is met or refused.
struct KvPolicy {
  KvProfile profile = KvProfile::kFull;
  double ratio = 0.0;
  std::uint64_t max_bytes = 0;
  bool best_effort = false;  // the size is a server's default, not this request's wish
  int sinks = 4;
  int recent = 64;            // full-precision tail; a small budget shortens it
  std::int64_t window = 0;    // STREAM: recent tokens that stay; 0: the profile's own
  double lazy_threshold = 0;  // 0: 0.9
  LazyTest lazy_test = LazyTest::kPrefill;
  std::vector<HeadOverride> overrides = {};
};

// Carried out by a stage for one (layer, KV head).
struct HeadPlan {
  KvMode mode = KvMode::kFull;
  KvSelector selector = KvSelector::kNone;
  kernels::KvCodec codec = {};
  // Of a codebook's tokens where entries and references would cost more: kRaw or kLloyd4.
  kernels::KvFormat fallback = kernels::KvFormat::kLloyd4;
  std::int64_t n_keep = 0;  // EVICT: candidates that stay beside sinks and observation window
  std::int64_t window = 0;  // STREAM
  bool operator==(const HeadPlan&) const = default;
};
std::string plan_name(const HeadPlan& plan);  // "EVICT lloyd4/lloyd4", "STREAM raw/raw 256"

// Candidates are the tokens between the sinks (or what an earlier boundary left) and the
// observation window.
struct SequencePlan {
  int sinks = 4;   // stay in full precision
  int recent = 0;  // full-precision tail, a multiple of 32; 0: everything is encoded
  std::vector<HeadPlan> heads = {};  // [n_layers * n_kv_heads]
  bool operator==(const SequencePlan&) const = default;
};
// Everything in full precision.
SequencePlan uncompressed_plan(const KvPolicy& policy, const KvModel& model);
bool is_uncompressed(const SequencePlan& plan);

// Calibrated errors of one (layer, KV head): KL to the full cache when only that head gets the
// option.
struct HeadErrors {
  double k_bits[4] = {};  // lloyd K with 1 to 4 bits, V raw
  double v_bits[4] = {};
  double int4 = 0;
  double codebook = 0;
  double codebook_k_entries = 1;  // entries per token
  double codebook_v_entries = 1;
  double window64 = 0;
  double window256 = 0;
};
struct ProfileTable {
  std::string model;
  std::vector<HeadErrors> heads = {};  // [n_layers * n_kv_heads]
};

// What a stage must compute at a boundary so that a plan can be made and carried out.
struct BoundaryNeeds {
  bool window_scores = false;  // the queries of the observation window must be kept
  bool lazy_mass = false;
  KvSelector selector = KvSelector::kNone;  // whose scores; one selector per policy
  bool histograms = false;                  // of those scores, for a global selection
  std::int64_t lazy_window = 0;
};
BoundaryNeeds boundary_needs(const KvPolicy& policy, const KvModel& model);

// Share of the tokens that a head may come to keep, which bounds DefensiveKV's boost.
double boost_share(const KvPolicy& policy, const KvModel& model, const ProfileTable* table,
                   std::int64_t n_tokens);

// What the stages reported, [n_tables]; empty vectors where boundary_needs did not ask.
struct BoundaryReport {
  std::int64_t n_tokens = 0;      // at the boundary, from position 0
  std::int64_t n_candidates = 0;  // new tokens before the observation window, sinks excluded
  std::vector<double> lazy_mass;  // [n_layers]
  std::vector<kernels::ScoreHistogram> histograms;
  // A later boundary: the plan of the one before, and the tokens that were in no body then (its
  // tail and what came since). Null, or an uncompressed plan: all tokens are new.
  const SequencePlan* earlier = nullptr;
  std::int64_t n_new_tokens = 0;
  // Token ids that no earlier boundary has seen, without doubles; -1: unknown, taken for as many as
  // there are tokens. Without a token table layer 0's bytes depend on it.
  std::int64_t n_new_ids = -1;
};
// Of ids[n_seen, n): how many are not among ids[0, n_seen), each counted once. Ids outside the
// vocabulary count every time.
std::int64_t count_new_ids(std::span<const std::int32_t> ids, std::int64_t n_seen, int vocab_size);

// The plan, with bytes at most the budget. INVALID_ARGUMENT when the policy cannot reach its budget
// (the message names the smallest that it can). The policy has passed validate_policy.
//
// At a later boundary heads keep their modes, codecs and windows; only n_keep is decided, for the
// policy's share of the new tokens that leave the tail, and as near to it as can be: it never fails
// for the budget.
Result<SequencePlan> plan_boundary(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, const BoundaryReport& report);

// INVALID_ARGUMENT naming the field at fault: ranges, a ratio below the profile's floor for this
// many prompt tokens, a window longer than the prompt, a profile that needs another head_dim.
// `n_ids` is the number of the prompt's distinct ids, as BoundaryReport::n_new_ids.
Status validate_policy(const KvPolicy& policy, const KvModel& model, std::int64_t n_prompt_tokens,
                       const ProfileTable* table = nullptr, std::int64_t n_ids = -1);

// Bytes (kv_bytes.cc), as the store lays them out; the waste of packing is not in them. Figures of
// heads in kCodebook are estimates from `errors` (the table), at most those of kLloyd4, to which
// the store falls back; without errors they are those of kLloyd4. Those of kToken without a token
// table are exact when all ids are new: `n_ids` of them, as BoundaryReport::n_new_ids.

std::uint64_t full_bytes(const KvModel& model, std::int64_t n_tokens);  // 16 bit, no pages
std::uint64_t page_bytes(const KvModel& model);
// Tokens of the full-precision tail: from n_tokens - recent, aligned down to a block.
std::int64_t tail_length(int recent, std::int64_t n_tokens);

struct HeadTokens {
  std::int64_t body = 0;  // sinks included
  std::int64_t tail = 0;
};
// What a head holds at its first boundary, where heads with a plain tail have tail_tokens in it. An
// EVICT head holds at most this: less where kept candidates lie in the tail, or where the query
// heads of kSpindleKv agree. kToken heads have no tail, FULL raw/raw heads nothing else, and STREAM
// raw/raw heads have their window in it.
HeadTokens head_tokens(const HeadPlan& plan, const KvModel& model, int sinks, std::int64_t n_tokens,
                       std::int64_t tail_tokens);

// Blocks of n tokens that are no sinks, positions included, means not.
std::uint64_t head_block_bytes(const HeadPlan& plan, const KvModel& model, std::int64_t n,
                               const HeadErrors* errors = nullptr, std::int64_t n_ids = -1);
// Of n_kept tokens outside the tail, sinks included.
std::uint64_t head_body_bytes(const HeadPlan& plan, const KvModel& model, int sinks,
                              std::int64_t n_kept, const HeadErrors* errors = nullptr,
                              std::int64_t n_ids = -1);
std::uint64_t head_bytes(const HeadPlan& plan, const KvModel& model, int sinks,
                         std::int64_t n_tokens, std::int64_t tail_tokens,
                         const HeadErrors* errors = nullptr, std::int64_t n_ids = -1);
std::uint64_t plan_bytes(const SequencePlan& plan, const KvModel& model, std::int64_t n_tokens,
                         std::int64_t tail_tokens, const ProfileTable* table = nullptr,
                         std::int64_t n_ids = -1);

}  // namespace spindle::kvstore
