#pragma once
// Continuous batching: which tokens of which requests make up the next step. Pure logic, driven by
// calls and a clock that the caller reads, so that it runs in simulation as it runs in the daemon.
//
// A step is a micro-batch: prefill chunks and decode tokens of distinct sequences, at most
// max_num_batched_tokens. Up to max_in_flight steps are on their way through the stages at once.
// The stages work through plans in order, so a request may have several prefill chunks in flight; a
// decode token needs its predecessor's result. Decode tokens are spread evenly over the
// micro-batches.
//
// At the end of a prompt segment the stages report scores, rank 0 makes the plan of what every KV
// head keeps (kvstore/plan), and the next step plan carries it out before anything more of the
// sequence runs. Generated tokens leave the full-precision tail every kGeneratedBoundary tokens.
//
// A sequence can be kept when its request ends (a session) and continued by a later one, which
// forks it where the prompts part. Sessions are given up for running requests, oldest first.
//
// Requests are tried in the order of WaitingQueue and admitted when the KV ledger has room for the
// prompt and what follows it up to the next boundary, beside some for those that run to grow;
// max_num_seqs bounds them. Later boundaries need more room. Where there is none, the youngest
// request of the lowest priority gives its KV back and waits again; computed anew, its output is
// the same. Requests with several choices, sessions or scores of their prompt are admitted for all
// they may take, and never give it back.
//
// The choices of a request share one prefill: they are sampled from the same logits and fork from
// the first choice's cache in the next plan.
//
// Thread-safety: none; the engine's thread owns it.

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cluster/coordinator/budget_balancer.h"
#include "cluster/coordinator/kv_ledger.h"
#include "cluster/coordinator/waiting_queue.h"
#include "cluster/engine/engine.h"
#include "proto/control.pb.h"

namespace spindle::coordinator {

struct SchedulerConfig {
  int max_num_seqs = 64;
  int max_num_batched_tokens = 512;
  int max_in_flight = 1;
  int max_num_queued_reqs = 256;  // beside those for which a place to run is free
  std::int64_t max_num_queued_tokens = 1 << 20;
  // KV that those who wait will take at admission, over all stages.
  std::uint64_t max_queued_kv_bytes = std::numeric_limits<std::uint64_t>::max();
  // Context at which a token's attention costs as much as the rest of it: prefill chunks shrink
  // with the tokens before them, so that steps take equal time. 0: attention costs nothing.
  std::int64_t attention_parity_tokens = 0;
  std::uint64_t seed = 0;  // for requests without one
  std::vector<std::int32_t> eos_token_ids;
  engine::EngineLimits limits;
  kvstore::KvModel kv_model;
  std::shared_ptr<const kvstore::ProfileTable> profile_table;  // may be null
  int max_sessions = 64;
  std::int64_t session_ttl_us = 600'000'000;
  std::uint64_t max_session_bytes = 0;  // on each stage; 0: half of its pool
  int budget_report_steps = 16;         // between two reports, with a balancer
};

// What happened to one request since the last take_events().
struct RequestEvents {
  engine::RequestHandle request = 0;
  std::vector<engine::PromptScore> scores;
  std::vector<engine::TokenEvent> tokens;
  int preemptions = 0;
  bool ended = false;
  Status status;                   // with `ended`
  engine::RequestSummary summary;  // with `ended`
};

class Scheduler {
 public:
  Scheduler(SchedulerConfig config, KvLedger ledger);
  ~Scheduler();

  // OK, or why a request would be refused whatever it asks for.
  Status admission() const;
  Result<engine::RequestHandle> submit(engine::EngineRequest request, std::int64_t now_us);
  // False for a request that is not there or has ended.
  bool cancel(engine::RequestHandle request, std::int64_t now_us);
  void finish_choice(engine::RequestHandle request, std::int32_t choice, std::int64_t now_us);
  // From now on submit refuses with UNAVAILABLE.
  void start_draining() { draining_ = true; }
  // From now on levels of `ladder` decide what requests keep that asked for no size of their own.
  void set_balancer(BudgetBalancer balancer, kvstore::LevelLadder ladder);
  // The stages' reports that a plan asked for. A decision has been taken to heart when it is
  // returned: plans from its effective step on follow it. INTERNAL as BudgetBalancer::decide.
  Result<std::optional<BudgetDecision>> balance(std::span<const BudgetReport> reports,
                                                std::int64_t now_us);
  // The last plan decided on; of epoch 0 before the first.
  const BudgetPlan& budget_plan() const { return budget_plan_; }
  // Ends every request with `status`; nothing is scheduled afterwards but the freeing of KV.
  void fail_all(const Status& status, std::int64_t now_us);

  // The next plan to send, or nothing when there is no work or enough is in flight.
  std::optional<control::StepPlan> next_step(std::int64_t now_us);
  // A stage finished a step. INTERNAL when the result belongs to no step in flight or reports an
  // error: the engine must stop.
  Status on_result(const control::StepResult& result, std::int64_t now_us);
  std::vector<RequestEvents> take_events();

  // No request is waiting or running and no step is in flight.
  bool idle() const;
  int in_flight() const { return static_cast<int>(in_flight_.size()); }
  // When the oldest step in flight was sent, and its number.
  std::optional<std::pair<std::int64_t, std::uint64_t>> oldest_step() const;
  // Everything but the stages' own figures; of those what rank 0 decides.
  engine::EngineStats stats() const;
  // Of those, the numbers of requests and tokens so far.
  const engine::EngineStats& counters() const { return counters_; }
  // Places of max_num_seqs that are taken.
  int running_sequences() const { return running_sequences_; }
  // Those that stats() counts as running, oldest first, then those that wait, in their order; at
  // most `limit`.
  std::vector<engine::ActiveRequest> active_requests(std::size_t limit, std::int64_t now_us) const;
  const KvLedger& ledger() const { return ledger_; }
  const SchedulerConfig& config() const { return config_; }

 private:
  struct Choice;
  struct Boundary;
  struct Request;
  struct Step {
    std::int64_t sent_us = 0;
    std::vector<bool> reported;           // [n_stages]
    std::vector<std::int64_t> committed;  // [n_stages] in the ledger, once the plan is carried out
    double prefill_cost = 0;              // as StepBudget has it
    bool has_decode = false;
    bool has_growth = false;
  };
  // What is left of a step while it is composed.
  struct StepBudget {
    std::int64_t tokens = 0;
    double cost = 0;  // in tokens without a context
  };

  // A sequence that outlived its request.
  struct Session {
    std::uint64_t owner = 0;
    std::uint64_t sequence = 0;
    std::vector<std::int32_t> tokens;    // in the cache
    std::int64_t n_compressed = 0;       // a boundary passed here
    std::int64_t tail_begin = 0;         // tokens before this are in no tail that rolls on
    std::int64_t oldest_tail_begin = 0;  // nor, before this, in any that selects
    std::optional<kvstore::SequencePlan> plan;
    std::int64_t used_us = 0;
  };

  // Nothing of it will run; the stages may still have to free its KV.
  static bool has_ended(const Request& request);
  static engine::ActiveRequest active_request(const Request& request, std::int64_t now_us);
  Status check_kv(Request& request) const;
  void count_waiting(Request& request, int sign);
  Status check_pages(const control::StepResult& result, std::size_t stage, const Step& step) const;
  void plan_boundaries(control::StepPlan& plan);
  Status on_boundary_scores(const control::BoundaryScores& scores, std::size_t stage,
                            std::int64_t now_us);
  void make_boundary_plan(Request& request, std::int64_t now_us);
  void on_compressed(const control::CompressedSequence& compressed, std::uint64_t step,
                     std::size_t stage, std::int64_t now_us);
  void on_grown(const control::GrownSequence& grown, std::uint64_t step, std::size_t stage);
  void add_boundary_use(Request& request, const control::CompressedSequence& compressed,
                        std::size_t stage) const;
  void on_prompt_score(const control::PromptScore& score);
  void leave_boundary(Request& request);
  void free_after_last_run(control::StepPlan& plan, Request& request, Choice& choice);
  static bool compresses_after(const Request& request, const Choice& choice, std::int64_t n_cached);
  void add_compress(control::StepPlan& plan, Request& request, const Choice& choice,
                    std::int64_t n_tokens) const;
  kvstore::BoundaryNeeds needs_of(const Request& request) const;
  // Distinct ids of the prompt's first n_tokens that are not among its first n_seen, which a plan's
  // bytes depend on without a token table; -1 with one.
  std::int64_t new_ids(const Request& request, std::int64_t n_seen, std::int64_t n_tokens) const;
  int first_layer(std::size_t stage) const;

  Status check_session(const engine::EngineRequest& request) const;
  Status continue_session(Request& request);
  void keep_session(Request& request, const Choice& choice, std::int64_t now_us);
  void drop_session(const std::string& id);
  template <typename Release>
  void give_back(const Release& release);
  std::vector<std::string> oldest_sessions() const;
  bool make_room(const Request& request);
  bool drop_oldest_session();
  void begin_anew(Request& request) const;
  void expire_sessions(std::int64_t now_us);
  bool sessions_are_too_many() const;

  void plan_forks(control::StepPlan& plan);
  void add_prompt_scores(const Request& request, int n_tokens, control::Run& run) const;
  void add_boundaries(const Request& request, control::OpenSequence& open) const;
  bool plan_decode(control::StepPlan& plan, StepBudget& budget, std::int64_t now_us);
  double plan_prefill(control::StepPlan& plan, StepBudget& budget);
  double prefill_share() const;
  std::vector<engine::RequestHandle> prefill_order() const;
  static std::int64_t left_to_prefill(const Request& request);
  void plan_chunk(control::StepPlan& plan, Request& request, double share, StepBudget& budget);
  std::int64_t chunk_tokens(std::int64_t n_before, double cost) const;
  double chunk_cost(std::int64_t n_before, std::int64_t n_tokens) const;

  // scheduler_budget.cc
  void plan_budget(control::StepPlan& plan);
  void add_budget(engine::EngineStats& stats) const;
  BalancerInput balancer_input(std::int64_t now_us, std::vector<LedgerUse>& ledger) const;
  Result<std::vector<kvstore::LayerRatio>> levels_of(Request& request, std::int32_t n_tokens) const;
  void add_planned_bytes(const Request& request, std::int64_t n_tokens,
                         control::Compress& order) const;

  // scheduler_admission.cc
  enum class Room : std::uint8_t { kFound, kNone, kEnded };
  void admit(control::StepPlan& plan, const StepBudget& budget, std::int64_t now_us);
  bool may_prefill(const Request& request, const StepBudget& budget) const;
  Room try_admit(control::StepPlan& plan, Request& request, std::int64_t now_us);
  Room commit(Request& request, std::int64_t now_us);
  bool preempt_lower(const Request& request);
  std::vector<std::int64_t> headroom() const;
  void set_tokens_ahead(Request& request, std::int64_t n_tokens);
  Room find_grant(Request& request, control::StepPlan& plan, std::int64_t n_tokens,
                  std::int64_t now_us);
  bool grow_after_run(Request& request, control::StepPlan& plan, std::int64_t n_tokens);
  void grant(Request& request, control::StepPlan& plan, std::int64_t granted,
             const std::vector<std::int64_t>& pages);
  std::vector<std::int64_t> pages_to_grow(const Request& request,
                                          std::int64_t granted_tokens) const;
  void set_preemptible(Request& request, bool can_be);
  void preempt(Request& request);
  void expire_requests(std::int64_t now_us);
  void on_sampled(const control::Sampled& sampled, std::int64_t now_us);
  void on_freed(const control::FreedSequence& freed, std::size_t stage, std::int64_t now_us);
  void end_choice(Request& request, Choice& choice);
  void free_choice(Request& request, Choice& choice);
  void free_waiting_choice(Request& request);
  void end_if_complete(Request& request, std::int64_t now_us);
  void stop_request(Request& request, const Status& status, std::int64_t now_us);
  RequestEvents& events_of(const Request& request);
  control::OpenSequence open_message(const Request& request, const Choice& choice) const;
  engine::FinishReason finish_reason(const Request& request, const Choice& choice,
                                     std::int32_t token) const;

  SchedulerConfig config_;
  KvLedger ledger_;
  bool draining_ = false;
  std::uint64_t next_handle_ = 1;
  std::uint64_t next_sequence_ = 1;
  std::uint64_t next_step_ = 1;
  std::unordered_map<engine::RequestHandle, std::unique_ptr<Request>> requests_;
  std::unordered_map<std::uint64_t, std::pair<Request*, std::size_t>> sequences_;  // -> choice
  WaitingQueue waiting_;
  std::uint64_t waiting_kv_bytes_ = 0;
  std::set<std::pair<std::int64_t, engine::RequestHandle>> deadlines_;
  std::deque<engine::RequestHandle> prefilling_;  // in the order of admission
  // Those that run and may be preempted, by (priority, admission): the last one goes first.
  std::map<std::pair<std::int32_t, std::uint64_t>, Request*> preemptible_;
  // Sequences of requests that were preempted, and the stages that are still to free them.
  std::unordered_map<std::uint64_t, std::pair<Request*, std::size_t>> preempted_;
  std::deque<std::uint64_t> ready_;  // sequences with a token to run; ended ones are skipped
  std::vector<std::uint64_t> to_fork_;
  std::vector<std::uint64_t> to_free_;
  // [n_stages]: given back in the ledger by sequences whose free is in no plan yet. A plan's forks
  // come before its frees, so that a continued session cannot have them.
  std::vector<std::int64_t> unsent_pages_;
  std::map<std::uint64_t, Step> in_flight_;
  std::vector<control::Compress> to_compress_;
  std::map<std::string, Session> sessions_;
  std::vector<RequestEvents> events_;
  std::unordered_map<engine::RequestHandle, std::size_t> event_index_;
  int running_sequences_ = 0;      // choices admitted and not ended
  int decoding_sequences_ = 0;     // of those, past their first token
  std::int64_t tokens_ahead_ = 0;  // uncompressed ones whose room those admitted will soon ask for
  double lane_credit_ = 0;         // see plan_prefill
  std::uint64_t n_admissions_ = 0;
  std::optional<BudgetBalancer> balancer_;
  kvstore::LevelLadder ladder_;
  BudgetPlan budget_plan_;
  std::uint64_t budget_epoch_ = 0;   // in effect
  std::vector<std::size_t> levels_;  // [n_stages] in effect
  bool report_outstanding_ = false;  // reports were asked for and are not here
  std::uint64_t next_report_step_ = 0;
  engine::EngineStats counters_;
};

// OK, or INVALID_ARGUMENT naming the field at fault.
Status validate_request(const engine::EngineRequest& request, const engine::EngineLimits& limits);

}  // namespace spindle::coordinator
