// Boundaries: from the stages' scores to the plan that they carry out. The rest of the class is in
// scheduler.cc.

#include <algorithm>
#include <span>
#include <string>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {

KvDemand Scheduler::Request::demand() const { return demand(most_tokens()); }

KvDemand Scheduler::Request::demand(std::int64_t granted) const {
  return request_demand({.n_before_output = n_before_output(),
                         .granted = granted,
                         .n_choices = request.sampling.n_choices,
                         .n_boundaries = static_cast<int>(boundaries.size()),
                         .last_boundary = boundaries.empty() ? 0 : boundaries.back(),
                         .sinks = request.kv_policy.sinks,
                         .recent = request.kv_policy.recent,
                         .continues_compressed = continues_compressed,
                         .n_cached = n_cached,
                         .inherited_tail_begin = inherited_tail_begin,
                         .inherited_recent = inherited_recent});
}

Status Scheduler::check_kv(Request& request) const {
  const engine::EngineRequest& asked = request.request;
  std::int32_t before = 0;
  for (const std::int32_t position : asked.compress_at) {
    if (position <= before || position > request.n_prompt()) {
      return invalid_argument("compress_at must be ascending positions in the prompt of " +
                              std::to_string(request.n_prompt()) + " tokens");
    }
    before = position;
  }
  if (asked.resumed_tokens < 0 || asked.resumed_tokens >= request.n_prompt()) {
    return invalid_argument("resumed_tokens must leave at least one token of the prompt");
  }
  if (asked.resumed_tokens > 0 && (before > request.n_before_output() ||
                                   !asked.session_id.empty() || asked.sampling.n_choices > 1)) {
    return invalid_argument(
        "resumed_tokens goes with one choice, no session and boundaries in the prompt");
  }
  const engine::PromptScores& scores = asked.prompt_scores;
  if (scores.end != 0 &&
      (scores.first < 1 || scores.first >= scores.end || scores.end > request.n_prompt())) {
    return invalid_argument("prompt_scores must be a range of prompt positions from 1 on");
  }
  if (!request.has_policy()) return ok_status();
  request.boundaries = asked.compress_at;
  if (request.boundaries.empty()) {
    request.boundaries.push_back(static_cast<std::int32_t>(request.n_before_output()));
  }
  return kvstore::validate_policy(asked.kv_policy, config_.kv_model, request.boundaries.front(),
                                  config_.profile_table.get(),
                                  new_ids(request, 0, request.boundaries.front()));
}

std::int64_t Scheduler::new_ids(const Request& request, std::int64_t n_seen,
                                std::int64_t n_tokens) const {
  if (config_.kv_model.token_table) return -1;
  return kvstore::count_new_ids(
      std::span(request.request.prompt_ids).first(static_cast<std::size_t>(n_tokens)), n_seen,
      config_.kv_model.vocab_size);
}

kvstore::BoundaryNeeds Scheduler::needs_of(const Request& request) const {
  return kvstore::boundary_needs(request.request.kv_policy, config_.kv_model);
}

int Scheduler::first_layer(std::size_t stage) const {
  int first = 0;
  for (std::size_t s = 0; s < stage; ++s) first += ledger_.stages()[s].n_layers;
  return first;
}

void Scheduler::add_boundaries(const Request& request, control::OpenSequence& open) const {
  for (std::size_t i = request.next_boundary; i < request.boundaries.size(); ++i) {
    open.add_boundaries(request.boundaries[i]);
  }
  if (open.boundaries().empty()) return;
  const kvstore::KvPolicy& policy = request.request.kv_policy;
  const kvstore::BoundaryNeeds needs = needs_of(request);
  control::BoundaryNeeds& out = *open.mutable_needs();
  out.set_window_scores(needs.window_scores);
  out.set_lazy_mass(needs.lazy_mass);
  out.set_selector(static_cast<std::int32_t>(needs.selector));
  out.set_histograms(needs.histograms);
  out.set_lazy_window(needs.lazy_window);
  out.set_lazy_decode(policy.lazy_test == kvstore::LazyTest::kDecode);
  out.set_sinks(policy.sinks);
  out.set_boost_share(kvstore::boost_share(policy, config_.kv_model, config_.profile_table.get(),
                                           request.boundaries.front()));
}

Status Scheduler::on_boundary_scores(const control::BoundaryScores& scores, std::size_t stage,
                                     std::int64_t now_us) {
  const auto found = sequences_.find(scores.sequence());
  if (found == sequences_.end()) return ok_status();
  Request& request = *found->second.first;
  if (!request.at_boundary || (request.choices_left == 0 && !request.choices.front().kept)) {
    return ok_status();
  }
  Boundary& boundary = request.reported.back();
  const int n_layers = ledger_.stages()[stage].n_layers;
  const int n_tables = n_layers * config_.kv_model.n_kv_heads;
  if (scores.n_tokens() != boundary.n_tokens || boundary.reports_left == 0 ||
      (scores.lazy_mass_size() != 0 && scores.lazy_mass_size() != n_layers) ||
      (scores.histograms_size() != 0 && scores.histograms_size() != n_tables)) {
    return internal_error("stage " + std::to_string(stage) + " scored a boundary of sequence " +
                          std::to_string(scores.sequence()) + " that is not expected");
  }
  kvstore::BoundaryReport& report = boundary.report;
  report.n_candidates = std::max(report.n_candidates, scores.n_candidates());
  const auto first = static_cast<std::size_t>(first_layer(stage));
  const auto n_kv_heads = static_cast<std::size_t>(config_.kv_model.n_kv_heads);
  if (!scores.lazy_mass().empty()) {
    report.lazy_mass.resize(static_cast<std::size_t>(config_.kv_model.n_layers));
    std::copy(scores.lazy_mass().begin(), scores.lazy_mass().end(),
              report.lazy_mass.begin() + static_cast<std::ptrdiff_t>(first));
  }
  if (!scores.histograms().empty()) {
    report.histograms.resize(static_cast<std::size_t>(config_.kv_model.n_tables()));
  }
  for (int i = 0; i < scores.histograms_size(); ++i) {
    const control::Histogram& histogram = scores.histograms(i);
    if (histogram.bin_size() != histogram.count_size()) {
      return internal_error("a histogram whose bins and counts differ in number");
    }
    kernels::ScoreHistogram& out =
        report.histograms[first * n_kv_heads + static_cast<std::size_t>(i)];
    out.bin.assign(histogram.bin().begin(), histogram.bin().end());
    out.count.assign(histogram.count().begin(), histogram.count().end());
  }
  boundary.stage_us.resize(ledger_.stages().size());
  boundary.stage_us[stage] += scores.score_us();
  if (--boundary.reports_left == 0) make_boundary_plan(request, now_us);
  return ok_status();
}

void Scheduler::make_boundary_plan(Request& request, std::int64_t now_us) {
  Boundary& boundary = request.reported.back();
  boundary.report.n_tokens = boundary.n_tokens;
  boundary.report.n_new_tokens = boundary.n_tokens - request.tail_begin;
  const bool later = request.plan && !kvstore::is_uncompressed(*request.plan);
  boundary.report.n_new_ids = new_ids(request, later ? request.n_compressed : 0, boundary.n_tokens);
  boundary.report.earlier = request.plan ? &*request.plan : nullptr;
  const auto levels = levels_of(request, boundary.n_tokens);
  if (!levels.ok()) {
    stop_request(request, levels.status(), now_us);
    return;
  }
  auto plan = kvstore::plan_boundary(request.request.kv_policy, config_.kv_model,
                                     config_.profile_table.get(), boundary.report, *levels);
  if (!plan.ok()) {
    stop_request(request, plan.status(), now_us);
    return;
  }
  boundary.plan = std::move(*plan);
  boundary.planned = true;
  boundary.report.earlier = nullptr;
  boundary.use.position = boundary.n_tokens;
  for (int table = 0; table < config_.kv_model.n_tables(); ++table) {
    engine::HeadKvUse head;
    head.layer = table / config_.kv_model.n_kv_heads;
    head.kv_head = table % config_.kv_model.n_kv_heads;
    head.plan = kvstore::plan_name(boundary.plan.heads[static_cast<std::size_t>(table)]);
    if (!boundary.report.lazy_mass.empty()) {
      head.lazy_mass = boundary.report.lazy_mass[static_cast<std::size_t>(head.layer)];
    }
    boundary.use.heads.push_back(std::move(head));
  }
  request.plan = boundary.plan;
  request.n_compressed = boundary.n_tokens;
  request.tail_begin =
      boundary.n_tokens - kvstore::tail_length(boundary.plan.recent, boundary.n_tokens);
  if (!kvstore::is_uncompressed(boundary.plan)) request.oldest_tail_begin = request.tail_begin;
  control::Compress order;
  order.set_sequence(request.choices.front().sequence);
  order.set_n_tokens(boundary.n_tokens);
  order.set_sinks(boundary.plan.sinks);
  order.set_recent(boundary.plan.recent);
  order.set_selects(true);
  order.set_prompt_left(static_cast<std::int32_t>(request.n_prompt()) - boundary.n_tokens);
  order.set_boundaries_left(
      static_cast<std::int32_t>(request.boundaries.size() - request.next_boundary) - 1);
  order.set_forks(request.choices.size() > 1);
  for (const kvstore::HeadPlan& head : boundary.plan.heads) {
    control::HeadPlan& out = *order.add_heads();
    out.set_mode(static_cast<std::int32_t>(head.mode));
    out.set_selector(static_cast<std::int32_t>(head.selector));
    out.set_k_format(static_cast<std::int32_t>(head.codec.k));
    out.set_v_format(static_cast<std::int32_t>(head.codec.v));
    out.set_n_keep(head.n_keep);
    out.set_window(head.window);
    out.set_fallback(static_cast<std::int32_t>(head.fallback));
  }
  if (request.reported.size() == 1) {
    add_planned_bytes(request, boundary.n_tokens, order);
  }
  to_compress_.push_back(std::move(order));
  request.compressions_pending += static_cast<int>(ledger_.stages().size());
  request.page_reports_pending += static_cast<int>(ledger_.stages().size());
  leave_boundary(request);
}

void Scheduler::leave_boundary(Request& request) {
  request.at_boundary = false;
  ++request.next_boundary;
  free_waiting_choice(request);
  if (request.n_prefilled < request.n_prompt()) {
    prefilling_.push_front(request.handle);
    return;
  }
  for (Choice& choice : request.choices) {
    if (choice.state != Choice::State::kHeld) continue;
    choice.state = Choice::State::kReady;
    ready_.push_back(choice.sequence);
  }
}

void Scheduler::plan_boundaries(control::StepPlan& plan) {
  for (control::Compress& order : to_compress_) {
    const auto found = sequences_.find(order.sequence());
    if (found == sequences_.end()) continue;
    // A sequence that nobody goes on with may be gone.
    const Request& request = *found->second.first;
    if (request.choices_left == 0 && !request.choices.front().kept) continue;
    *plan.add_compress() = std::move(order);
  }
  to_compress_.clear();
}

void Scheduler::add_compress(control::StepPlan& plan, Request& request, const Choice& choice,
                             std::int64_t n_tokens) const {
  request.page_reports_pending += static_cast<int>(ledger_.stages().size());
  control::Compress& order = *plan.add_compress();
  order.set_sequence(choice.sequence);
  order.set_n_tokens(static_cast<std::int32_t>(n_tokens));
  order.set_sinks(request.plan->sinks);
  order.set_recent(request.plan->recent);
}

void Scheduler::on_compressed(const control::CompressedSequence& compressed, std::uint64_t step,
                              std::size_t stage, std::int64_t now_us) {
  const auto found = sequences_.find(compressed.sequence());
  if (found == sequences_.end()) return;
  Request& request = *found->second.first;
  const Choice& choice = request.choices[found->second.second];
  const bool of_prompt = compressed.n_tokens() <= request.n_prompt();
  --request.page_reports_pending;
  std::int64_t pages = compressed.used_pages() + compressed.reserved_pages();
  // The plan's own growth came after it compressed.
  for (const Growth& growth : request.growths) {
    if (growth.step >= step) pages += growth.pages[stage];
  }
  ledger_.update_choice(request.handle, choice.index, stage, pages, of_prompt);
  request.used_pages.resize(ledger_.stages().size());
  request.prompt_pages.resize(ledger_.stages().size());
  if (choice.index == 0) {
    request.used_pages[stage] = compressed.used_pages();
    if (compressed.n_tokens() <= request.n_before_output()) {
      request.prompt_pages[stage] = compressed.used_pages();
    }
  }
  if (!of_prompt) return;
  add_boundary_use(request, compressed, stage);
  --request.compressions_pending;
  end_if_complete(request, now_us);
}

void Scheduler::on_grown(const control::GrownSequence& grown, std::uint64_t step,
                         std::size_t stage) {
  const auto found = sequences_.find(grown.sequence());
  if (found == sequences_.end()) return;
  Request& request = *found->second.first;
  --request.page_reports_pending;
  std::int64_t pages = grown.used_pages() + grown.reserved_pages();
  for (const Growth& growth : request.growths) {
    if (growth.step > step) pages += growth.pages[stage];
  }
  ledger_.update_choice(request.handle, 0, stage, pages, false);
}

void Scheduler::add_boundary_use(Request& request, const control::CompressedSequence& compressed,
                                 std::size_t stage) const {
  const auto boundary = std::find_if(
      request.reported.begin(), request.reported.end(),
      [&](const Boundary& b) { return b.planned && b.n_tokens == compressed.n_tokens(); });
  if (boundary == request.reported.end()) return;
  boundary->use.full_bytes += compressed.full_bytes();
  boundary->use.kept_bytes +=
      static_cast<std::uint64_t>(compressed.used_pages()) * ledger_.shape().page_bytes();
  boundary->stage_us.resize(ledger_.stages().size());
  boundary->stage_us[stage] += compressed.compress_us();
  boundary->use.compress_ms =
      static_cast<double>(*std::max_element(boundary->stage_us.begin(), boundary->stage_us.end())) *
      1e-3;
  const int first = first_layer(stage) * config_.kv_model.n_kv_heads;
  for (int i = 0; i < compressed.heads_size(); ++i) {
    const auto table = static_cast<std::size_t>(first + i);
    if (table >= boundary->use.heads.size()) break;
    engine::HeadKvUse& head = boundary->use.heads[table];
    head.kept_tokens = static_cast<std::int32_t>(compressed.heads(i).n_tokens());
    head.bytes = compressed.heads(i).bytes();
    if (compressed.heads(i).k_entries_per_token() >= 0) {
      head.k_entries_per_token = compressed.heads(i).k_entries_per_token();
    }
    if (compressed.heads(i).v_entries_per_token() >= 0) {
      head.v_entries_per_token = compressed.heads(i).v_entries_per_token();
    }
  }
}

void Scheduler::on_prompt_score(const control::PromptScore& score) {
  const auto found = sequences_.find(score.sequence());
  if (found == sequences_.end() || found->second.first->choices_left == 0) return;
  engine::PromptScore out;
  out.position = score.position();
  out.logprob = score.logprob();
  out.best_id = score.best_id();
  out.best_logprob = score.best_logprob();
  out.dense.assign(score.dense().begin(), score.dense().end());
  events_of(*found->second.first).scores.push_back(std::move(out));
}

}  // namespace spindle::coordinator
