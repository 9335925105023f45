#include "kvstore/plan/expected_use.h"

#include <algorithm>

#include "kvstore/plan/kv_projection.h"

namespace spindle::kvstore {
namespace {

constexpr std::int64_t kBlock = kernels::kKvBlockTokens;
// Bins of a head's made-up scores: their number bounds how unequally ties at the threshold fall.
constexpr std::int64_t kScoreBins = 1024;

bool is_raw(const HeadPlan& plan) { return plan.codec == kernels::KvCodec{}; }
bool is_token(const HeadPlan& plan) { return plan.codec.k == kernels::KvFormat::kToken; }

// One head right after a boundary.
struct HeadState {
  TailState tail;
  std::uint64_t body_bytes = 0;
};

void set_tail(TailState& tail, std::int64_t first, std::int64_t n_tokens) {
  tail.first = first;
  tail.origin = first == n_tokens ? first : tail.origin + (first - tail.origin) / kBlock * kBlock;
}

void count_pages(TailState& tail, std::int64_t n_tokens, int page_tokens) {
  tail.n_pages = pages_for_tokens(n_tokens - tail.origin, page_tokens);
  tail.n_own_pages = tail.n_pages;
}

HeadState at_prompt_end(const HeadPlan& plan, const SequencePlan& all, const KvModel& model,
                        const HeadErrors* errors, std::int64_t n_prompt) {
  const HeadTokens tokens =
      head_tokens(plan, model, all.sinks, n_prompt, tail_length(all.recent, n_prompt));
  HeadState head;
  set_tail(head.tail, n_prompt - tokens.tail, n_prompt);
  head.body_bytes = head_body_bytes(plan, model, all.sinks, tokens.body, errors);
  head.tail.has_k_mean = tokens.body > 0;
  head.tail.has_v_mean = tokens.body > 0;
  return head;
}

// What left the tail since then stays, in the head's codec; windows roll, and hold what they held.
void generate(const HeadPlan& plan, int recent, const KvModel& model, const HeadErrors* errors,
              std::int64_t n_tokens, HeadState& head) {
  const std::int64_t was_first = head.tail.first;
  if (is_raw(plan)) {
    if (plan.mode == KvMode::kStream && n_tokens - plan.window > was_first) {
      set_tail(head.tail, n_tokens - plan.window, n_tokens);
    }
    return;
  }
  const std::int64_t first =
      tail_begin(head.tail.origin, head.tail.first, is_token(plan) ? 0 : recent, n_tokens);
  set_tail(head.tail, first, n_tokens);
  if (plan.mode == KvMode::kStream) return;
  HeadPlan complete = plan;  // nothing is dropped any more, so no positions are kept
  complete.mode = KvMode::kFull;
  head.body_bytes += head_block_bytes(complete, model, first - was_first, errors);
}

}  // namespace

BoundaryReport even_report(const KvPolicy& policy, const KvModel& model, std::int64_t n_tokens) {
  BoundaryReport report;
  report.n_tokens = n_tokens;
  report.n_new_tokens = n_tokens;
  report.n_candidates = std::max<std::int64_t>(n_tokens - kObservationWindow - policy.sinks, 0);
  for (int layer = 0; layer < model.n_layers; ++layer) {
    double mass = 0;
    double digit = 0.5;
    for (int rest = layer; rest > 0; rest /= 2, digit /= 2) mass += rest % 2 * digit;
    report.lazy_mass.push_back(mass);
  }
  const std::int64_t n_bins = std::min(report.n_candidates, kScoreBins);
  kernels::ScoreHistogram histogram;
  for (std::int64_t bin = 0; bin < n_bins; ++bin) {
    histogram.bin.push_back(static_cast<std::uint16_t>(bin + 1));
    histogram.count.push_back(static_cast<std::uint32_t>(report.n_candidates * (bin + 1) / n_bins -
                                                         report.n_candidates * bin / n_bins));
  }
  report.histograms.assign(static_cast<std::size_t>(model.n_tables()), histogram);
  return report;
}

Result<SequencePlan> expected_plan(const KvPolicy& policy, const KvModel& model,
                                   const ProfileTable* table, std::int64_t n_tokens) {
  return plan_boundary(policy, model, table, even_report(policy, model, n_tokens));
}

ExpectedUse expected_use(const SequencePlan& plan, const KvModel& model, const ProfileTable* table,
                         const LayerSpan& span, std::int64_t n_prompt, std::int64_t n_generated,
                         std::int64_t granted_tokens) {
  const KvShape shape{model.n_kv_heads, model.head_dim, model.dtype};
  const PieceFormat format{shape, model.wide_positions(), model.wide_ids()};
  const std::int64_t n_tokens = n_prompt + n_generated;
  const Ahead ahead{.n_tokens = n_tokens,
                    .granted_tokens = granted_tokens,
                    .sinks = plan.sinks,
                    .recent = plan.recent};
  ExpectedUse use;
  std::uint64_t body_bytes = 0;
  std::uint64_t future_bytes = 0;
  const int first_table = span.first_layer * model.n_kv_heads;
  for (int i = first_table; i < first_table + span.n_layers * model.n_kv_heads; ++i) {
    const auto index = static_cast<std::size_t>(i);
    const HeadPlan& head_plan = plan.heads[index];
    const HeadErrors* errors = table == nullptr ? nullptr : &table->heads[index];
    HeadState head = at_prompt_end(head_plan, plan, model, errors, n_prompt);
    if (n_generated > 0) generate(head_plan, plan.recent, model, errors, n_tokens, head);
    count_pages(head.tail, n_tokens, shape.page_tokens);
    head.tail.by_id = is_token(head_plan) && !model.token_table;
    body_bytes += head.body_bytes;
    use.used_pages += head.tail.n_pages;
    use.reserved_pages += future_tail_pages(shape, head_plan, head.tail, ahead);
    future_bytes += future_piece_bytes(format, head_plan, head.tail, ahead);
  }
  const std::uint64_t page = shape.page_bytes();
  use.bytes = static_cast<std::uint64_t>(use.used_pages) * page + body_bytes;
  use.used_pages += static_cast<std::int64_t>((body_bytes + page - 1) / page);
  use.reserved_pages += future_piece_pages(shape, future_bytes);
  return use;
}

}  // namespace spindle::kvstore
