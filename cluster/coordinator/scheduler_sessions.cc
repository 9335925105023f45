// Kept sequences: what a request leaves on the stages for the next one. The rest of the class is in
// scheduler.cc.

#include <algorithm>
#include <string>

#include "cluster/coordinator/scheduler.h"
#include "cluster/coordinator/scheduler_state.h"

namespace spindle::coordinator {

namespace {

// Whether heads keep raw tokens that a later prompt boundary selects from: those generated stay.
bool selects_raw(const kvstore::SequencePlan& plan) {
  return std::any_of(plan.heads.begin(), plan.heads.end(), [](const kvstore::HeadPlan& head) {
    return head.mode == kvstore::KvMode::kEvict && head.codec == kernels::KvCodec{};
  });
}

}  // namespace

Status Scheduler::check_session(const engine::EngineRequest& request) const {
  if (request.session_id.empty()) {
    return request.keep_session ? invalid_argument("keep_session needs a session_id") : ok_status();
  }
  const auto found = sessions_.find(request.session_id);
  if (found == sessions_.end()) {
    if (request.keep_session) return ok_status();
    return not_found("session_id: there is no session \"" + request.session_id +
                     "\"; it was never kept, or it has expired");
  }
  // Whether a name exists is not another key's business.
  if (found->second.owner != request.owner) {
    return not_found("session_id: there is no session \"" + request.session_id +
                     "\" of this API key");
  }
  return ok_status();
}

void Scheduler::begin_anew(Request& request) const {
  request.session_sequence = 0;
  request.n_cached = 0;
  request.next_boundary = 0;
  request.plan.reset();
  request.n_compressed = 0;
  request.tail_begin = 0;
  request.oldest_tail_begin = 0;
  request.continues_compressed = false;
  request.inherited_tail_begin = 0;
  request.inherited_recent = 0;
}

// Decides how much of the session a request takes over, each time its admission is tried.
Status Scheduler::continue_session(Request& request) {
  begin_anew(request);
  if (request.request.session_id.empty()) return ok_status();
  if (Status status = check_session(request.request); !status.ok()) return status;
  const auto found = sessions_.find(request.request.session_id);
  if (found == sessions_.end()) return ok_status();  // this request starts it
  const Session& session = found->second;
  const std::vector<std::int32_t>& prompt = request.request.prompt_ids;
  const auto differs =
      std::mismatch(prompt.begin(), prompt.end(), session.tokens.begin(), session.tokens.end());
  const std::int64_t common = differs.first - prompt.begin();
  // At least one token must run, and those that score prompt tokens.
  std::int64_t start = std::min(common, request.n_prompt() - 1);
  if (request.request.prompt_scores.end > 0) {
    start = std::min<std::int64_t>(start, request.request.prompt_scores.first - 1);
  }
  // The next boundary's observation window must run again.
  while (request.next_boundary < request.boundaries.size() &&
         request.boundaries[request.next_boundary] <= session.n_compressed) {
    ++request.next_boundary;
  }
  if (request.next_boundary < request.boundaries.size()) {
    const std::int64_t window =
        request.boundaries[request.next_boundary] - kvstore::kObservationWindow;
    start = std::min(start, std::max(window, session.n_compressed));
  }
  if (start < session.n_compressed) {
    return invalid_argument(
        "session_id: the prompt repeats " + std::to_string(common) + " tokens of the session, " +
        "whose KV is compressed up to token " + std::to_string(session.n_compressed) +
        "; a prompt must repeat those, and may score and compress only what comes after");
  }
  if (start == 0) return ok_status();  // nothing to take over
  request.session_sequence = session.sequence;
  request.n_cached = start;
  request.plan = session.plan;
  request.n_compressed = session.n_compressed;
  request.tail_begin = session.tail_begin;
  request.continues_compressed = session.n_compressed > 0;
  request.oldest_tail_begin = session.oldest_tail_begin;
  request.inherited_tail_begin = session.oldest_tail_begin;
  request.inherited_recent = request.continues_compressed ? session.plan->recent : 0;
  return ok_status();
}

void Scheduler::keep_session(Request& request, const Choice& choice, std::int64_t now_us) {
  const std::string& id = request.request.session_id;
  if (sessions_.contains(id)) drop_session(id);
  Session session;
  session.owner = request.request.owner;
  session.sequence = choice.sequence;
  session.tokens = request.request.prompt_ids;
  session.tokens.insert(session.tokens.end(), choice.generated.begin(), choice.generated.end());
  session.tokens.resize(static_cast<std::size_t>(choice.n_cached));
  session.plan = request.plan;
  if (request.plan && !kvstore::is_uncompressed(*request.plan)) {
    session.n_compressed = request.n_compressed;
    session.tail_begin = request.tail_begin;
    session.oldest_tail_begin = request.oldest_tail_begin;
    // Generated tokens left the tail too, but of those that select at prompt boundaries only.
    const std::int64_t n_steps =
        std::max<std::int64_t>(choice.n_cached - request.n_prompt() - 1, 0) /
        kvstore::kGeneratedBoundary * kvstore::kGeneratedBoundary;
    if (n_steps > 0) {
      session.n_compressed = request.n_prompt() + n_steps;
      session.tail_begin =
          session.n_compressed - kvstore::tail_length(request.plan->recent, session.n_compressed);
      if (!selects_raw(*request.plan)) session.oldest_tail_begin = session.tail_begin;
    }
  }
  session.used_us = now_us;
  // Nothing frees this sequence, so its bytes are those of the last boundary, or all of them.
  for (std::size_t stage = 0; stage < ledger_.stages().size(); ++stage) {
    const kvstore::KvShape& shape = ledger_.shape();
    const int n_layers = ledger_.stages()[stage].n_layers;
    const std::int64_t n_pages = stage < request.used_pages.size()
                                     ? request.used_pages[stage]
                                     : kvstore::stage_pages(shape, n_layers, choice.n_cached);
    request.summary.kv[stage].full_bytes += kvstore::full_bytes(shape, n_layers, choice.n_cached);
    request.summary.kv[stage].kept_bytes +=
        static_cast<std::uint64_t>(n_pages) * shape.page_bytes();
  }
  // Also leaves the session that it continued, which may have been dropped just now.
  give_back([&] { ledger_.keep(request.handle, choice.sequence); });
  sessions_.emplace(id, std::move(session));
  for (const std::string& name : oldest_sessions()) {
    if (!sessions_are_too_many()) break;
    drop_session(name);
  }
}

bool Scheduler::sessions_are_too_many() const {
  if (static_cast<int>(sessions_.size()) > config_.max_sessions) return true;
  for (std::size_t stage = 0; stage < ledger_.stages().size(); ++stage) {
    std::int64_t n_pages = 0;
    for (const auto& [name, session] : sessions_) {
      n_pages += ledger_.kept_pages(session.sequence)[stage];
    }
    const std::int64_t limit =
        config_.max_session_bytes > 0
            ? static_cast<std::int64_t>(config_.max_session_bytes / ledger_.shape().page_bytes())
            : ledger_.stages()[stage].n_pages / 2;
    if (n_pages > limit) return true;
    // Requests that continue what a kept sequence began hold both.
    if (ledger_.committed_pages(stage) > ledger_.stages()[stage].n_pages) return true;
  }
  return false;
}

void Scheduler::drop_session(const std::string& id) {
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return;
  to_free_.push_back(found->second.sequence);
  give_back([&] { ledger_.release_kept(found->second.sequence); });
  sessions_.erase(found);
}

std::vector<std::string> Scheduler::oldest_sessions() const {
  std::vector<std::string> names;
  for (const auto& [name, session] : sessions_) names.push_back(name);
  std::stable_sort(names.begin(), names.end(), [this](const auto& a, const auto& b) {
    return sessions_.at(a).used_us < sessions_.at(b).used_us;
  });
  return names;
}

// Gives up as many sessions as the request needs, oldest first; none when that would not do. A
// request that continues a session itself has to wait until the stages have freed them.
bool Scheduler::make_room(const Request& request) {
  const std::vector<std::int64_t> demand = ledger_.total_pages(request.first_demand());
  const bool continues = request.session_sequence != 0;
  std::vector<std::int64_t> given_back = headroom();
  for (std::int64_t& pages : given_back) pages = -pages;
  if (ledger_.fits(demand, given_back)) {
    for (std::size_t s = 0; s < unsent_pages_.size(); ++s) given_back[s] -= unsent_pages_[s];
    return !continues || ledger_.fits(demand, given_back);
  }
  std::vector<std::string> names;
  for (const std::string& name : oldest_sessions()) {
    const std::uint64_t sequence = sessions_.at(name).sequence;
    if (sequence == request.session_sequence) continue;
    const std::vector<std::int64_t> pages = ledger_.releasable_pages(sequence);
    if (pages.empty()) continue;
    names.push_back(name);
    for (std::size_t s = 0; s < pages.size(); ++s) given_back[s] += pages[s];
    if (!ledger_.fits(demand, given_back)) continue;
    for (const std::string& given_up : names) drop_session(given_up);
    return !continues;
  }
  return false;
}

// The oldest of those that give something back.
bool Scheduler::drop_oldest_session() {
  for (const std::string& name : oldest_sessions()) {
    if (ledger_.releasable_pages(sessions_.at(name).sequence).empty()) continue;
    drop_session(name);
    return true;
  }
  return false;
}

void Scheduler::expire_sessions(std::int64_t now_us) {
  while (true) {
    const auto expired = std::find_if(sessions_.begin(), sessions_.end(), [&](const auto& entry) {
      return now_us - entry.second.used_us > config_.session_ttl_us;
    });
    if (expired == sessions_.end()) return;
    const std::string name = expired->first;
    drop_session(name);
  }
}

}  // namespace spindle::coordinator
