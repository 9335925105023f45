#pragma once
// A store with a made-up model's content: what every sequence must hold is known token by token.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kvstore/kv_store.h"
#include "kvstore/plan/kv_demand.h"
#include "tests/kvstore/fake_kv.h"

namespace spindle::kvstore::testing {

struct TestBoundary {
  int sinks = 4;
  int recent = 64;
  std::vector<HeadPlan> heads;
  bool selects = false;
  double keep_share = 0.3;  // of all positions, at random
  std::int64_t prompt_left = 0;
  int boundaries_left = 0;
  bool forks = false;
};

class TestStore {
 public:
  struct Options {
    int n_layers = 2;
    int n_kv_heads = 2;
    int head_dim = 32;
    int vocab = 60;
    bool wide = false;
    bool token_table = true;
    std::int64_t n_pages = 400;
    unsigned seed = 1;
  };
  explicit TestStore(const Options& options)
      : options_(options),
        model_(options.n_layers, options.n_kv_heads, options.head_dim, options.vocab, 8192,
               options.seed),
        random_(options.seed) {
    KvStoreConfig config;
    config.shape = shape();
    config.n_layers = options.n_layers;
    config.budget_bytes = static_cast<std::uint64_t>(options.n_pages) * config.shape.page_bytes();
    config.wide_positions = options.wide;
    config.wide_ids = options.wide;
    config.keeps_token_ids = true;
    store_ = *KvStore::create(config);
    if (options.token_table) store_->set_token_table(model_.k_tokens(), model_.v_tokens());
  }

  KvShape shape() const { return {options_.n_kv_heads, options_.head_dim, DType::kF16, 32}; }
  std::size_t n_tables() const {
    return static_cast<std::size_t>(options_.n_layers * options_.n_kv_heads);
  }
  KvStore& store() { return *store_; }
  const FakeKv& model() const { return model_; }
  const kernels::RopeTable& rope() const { return model_.rope(); }
  std::mt19937& random() { return random_; }
  const std::map<SequenceId, std::vector<std::int32_t>>& sequences() const { return tokens_; }

  Status open(SequenceId id, std::int64_t max_tokens, std::int64_t pages,
              std::int64_t granted_tokens = 0) {
    Status status = store_->open(id, max_tokens, pages, granted_tokens);
    if (status.ok()) tokens_[id];
    return checked(std::move(status));
  }
  Status fork(SequenceId parent, SequenceId child, std::int64_t n, std::int64_t max_tokens,
              std::int64_t pages) {
    Status status = store_->fork(parent, child, n, max_tokens, pages);
    if (status.ok()) {
      tokens_[child].assign(tokens_[parent].begin(), tokens_[parent].begin() + n);
    }
    return checked(std::move(status));
  }
  Status extend(SequenceId id, std::int64_t n) {
    return extend(id, random_tokens(n, options_.vocab, random_));
  }
  Status extend(SequenceId id, const std::vector<std::int32_t>& added) {
    const std::int64_t first = store_->length(id);
    Status status = store_->extend(id, added);
    if (!status.ok()) return checked(std::move(status));
    tokens_[id].insert(tokens_[id].end(), added.begin(), added.end());
    for (int layer = 0; layer < options_.n_layers; ++layer) {
      model_.append(layer, added, first, store_->writable_heads(id, layer), store_->page_layout());
    }
    return checked(std::move(status));
  }
  Result<BoundaryKept> compress(SequenceId id, const TestBoundary& wanted) {
    std::vector<std::vector<std::int32_t>> kept(wanted.selects ? n_tables() : 0);
    for (auto& positions : kept) {
      for (std::int32_t p = 0; p < store_->length(id); ++p) {
        if (random_() % 1000 < wanted.keep_share * 1000) positions.push_back(p);
      }
    }
    StageBoundary boundary;
    boundary.sinks = wanted.sinks;
    boundary.recent = wanted.recent;
    boundary.heads = wanted.heads;
    boundary.kept = kept;
    boundary.prompt_left = wanted.prompt_left;
    boundary.boundaries_left = wanted.boundaries_left;
    boundary.forks = wanted.forks;
    auto result = store_->compress(cpu(), &model_.rope(), id, boundary);
    store_->check_invariants();
    return result;
  }
  Result<FreedBytes> free(SequenceId id) {
    auto freed = store_->free(id);
    if (freed.ok()) tokens_.erase(id);
    store_->check_invariants();
    return freed;
  }

  void expect_content_of(SequenceId id) {
    for (int layer = 0; layer < options_.n_layers; ++layer) {
      for (int head = 0; head < options_.n_kv_heads; ++head) {
        expect_content(read(id, layer, head), tokens_.at(id), model_, layer, head);
      }
    }
  }
  std::vector<StoredToken> read(SequenceId id, int layer, int head) {
    return read_head(store_->head_cache(id, layer, head), store_->length(id),
                     store_->page_layout());
  }
  std::int64_t held_pages() const { return store_->pool().n_used() + store_->pool().n_reserved(); }

 private:
  Status checked(Status status) {
    store_->check_invariants();
    return status;
  }

  Options options_;
  FakeKv model_;
  std::mt19937 random_;
  std::unique_ptr<KvStore> store_;
  std::map<SequenceId, std::vector<std::int32_t>> tokens_;
};

inline HeadPlan random_plan(std::mt19937& random, bool layer_zero) {
  HeadPlan plan;
  const auto format = [&] {
    return static_cast<kernels::KvFormat>(
        random() % (static_cast<unsigned>(kernels::KvFormat::kCodebook) + 1));
  };
  const auto kind = random() % 10;
  if (kind == 0 && layer_zero) {
    plan.codec = {kernels::KvFormat::kToken, kernels::KvFormat::kToken};
    return plan;
  }
  plan.fallback = static_cast<kernels::KvFormat>(
      random() % static_cast<unsigned>(kernels::KvFormat::kCodebook));
  if (kind >= 3) plan.codec = {format(), format()};
  plan.mode = static_cast<KvMode>(random() % 3);
  if (plan.mode == KvMode::kEvict) {
    plan.selector = random() % 2 == 0 ? KvSelector::kSpindleKv : KvSelector::kDefensive;
    plan.n_keep = 1;
  }
  if (plan.mode == KvMode::kStream) plan.window = 1 + static_cast<std::int64_t>(random() % 300);
  return plan;
}

inline std::vector<HeadPlan> random_plans(std::mt19937& random, std::size_t n, std::size_t n_kv) {
  std::vector<HeadPlan> plans;
  const HeadPlan common = random_plan(random, false);
  const bool same = random() % 2 == 0;
  for (std::size_t i = 0; i < n; ++i) {
    plans.push_back(same ? common : random_plan(random, i < n_kv));
  }
  return plans;
}

inline std::string describe(const std::vector<HeadPlan>& plans) {
  std::string text;
  for (const HeadPlan& plan : plans) text += plan_name(plan) + "; ";
  return text;
}

}  // namespace spindle::kvstore::testing
