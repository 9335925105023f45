#pragma once
// A stage on the CPU that lets the next step begin while the tokens of one are awaited, as a GPU
// does: they are drawn, and what comes in the meantime is done before anybody knows them.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "worker/stage/stage.h"

namespace spindle::worker {

class EarlyStage final : public Stage {
 public:
  // Counts in `n_early` the forward passes of such steps.
  EarlyStage(std::unique_ptr<Stage> stage, std::atomic<int>& n_early)
      : stage_(std::move(stage)), n_early_(n_early) {}

  void bind_thread() override { stage_->bind_thread(); }
  const LlamaStageConfig& config() const override { return stage_->config(); }
  std::uint64_t weight_bytes() const override { return stage_->weight_bytes(); }
  std::span<std::byte> activations(std::int64_t n_tokens) override {
    return stage_->activations(n_tokens);
  }
  Status forward(std::span<const StageRun> runs, std::span<const std::int32_t> tokens) override {
    if (is_awaited_) ++n_early_;
    return stage_->forward(runs, tokens);
  }
  Status sample(std::span<const SampleRequest> requests, std::span<std::int32_t> tokens,
                const std::function<bool()>& meanwhile) override {
    const Status status = stage_->sample(requests, tokens, nullptr);
    if (!status.ok() || !meanwhile || requests.empty()) return status;
    const std::vector<std::int32_t> drawn(tokens.begin(), tokens.end());
    std::ranges::fill(tokens, -1);  // nobody may look yet
    is_awaited_ = true;
    // Long enough for a plan that comes a little later.
    for (int i = 0; i < 200 && meanwhile(); ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(10));
    }
    is_awaited_ = false;
    std::ranges::copy(drawn, tokens.begin());
    return status;
  }
  Result<std::span<const float>> logits(std::int64_t row) override { return stage_->logits(row); }
  Status prompt_logits(std::int64_t first_row, Rows logits) override {
    return stage_->prompt_logits(first_row, logits);
  }
  void open_boundaries(kvstore::SequenceId sequence, const ScoringNeeds& needs,
                       std::vector<std::int32_t> boundaries) override {
    stage_->open_boundaries(sequence, needs, std::move(boundaries));
  }
  bool is_boundary(kvstore::SequenceId sequence) const override {
    return stage_->is_boundary(sequence);
  }
  BoundarySummary score_boundary(kvstore::SequenceId sequence) override {
    return stage_->score_boundary(sequence);
  }
  Result<kvstore::BoundaryKept> compress(kvstore::SequenceId sequence,
                                         kvstore::StageBoundary boundary, bool selects) override {
    return stage_->compress(sequence, std::move(boundary), selects);
  }
  void close_boundaries(kvstore::SequenceId sequence) override {
    stage_->close_boundaries(sequence);
  }
  StageClock& clock() override { return stage_->clock(); }

 private:
  std::unique_ptr<Stage> stage_;
  std::atomic<int>& n_early_;
  bool is_awaited_ = false;
};

}  // namespace spindle::worker
