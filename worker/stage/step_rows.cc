#include "worker/stage/step_rows.h"

#include <algorithm>
#include <string>

namespace spindle::worker {

Status extend_for_step(const LlamaStageConfig& config, kvstore::KvStore& store,
                       std::span<const StageRun> runs, std::span<const std::int32_t> tokens,
                       std::int64_t n_rows, std::vector<std::int32_t>& positions) {
  if (n_rows > config.max_batched_tokens) {
    return invalid_argument("a step of " + std::to_string(n_rows) + " tokens, at most " +
                            std::to_string(config.max_batched_tokens) + " are allowed");
  }
  if (static_cast<std::int64_t>(tokens.size()) != n_rows) {
    return invalid_argument("the runs of a step have " + std::to_string(tokens.size()) +
                            " tokens, its activations " + std::to_string(n_rows));
  }
  if (config.is_first) {
    const auto outside = std::find_if(tokens.begin(), tokens.end(), [&](std::int32_t id) {
      return id < 0 || id >= config.model.vocab_size;
    });
    if (outside != tokens.end()) {
      return invalid_argument("token id " + std::to_string(*outside) +
                              " is not in the vocabulary of " +
                              std::to_string(config.model.vocab_size));
    }
  }
  positions.clear();
  for (const StageRun& run : runs) {
    if (run.n_tokens < 1 || store.length(run.sequence) != run.first_position ||
        run.first_position + run.n_tokens > config.max_model_len) {
      return invalid_argument("sequence " + std::to_string(run.sequence) + " holds " +
                              std::to_string(store.length(run.sequence)) +
                              " tokens, the plan runs " + std::to_string(run.n_tokens) +
                              " from position " + std::to_string(run.first_position));
    }
    if (positions.size() + static_cast<std::size_t>(run.n_tokens) > tokens.size()) {
      return invalid_argument("the runs of a step have more tokens than it brings");
    }
    const Status status = store.extend(
        run.sequence, tokens.subspan(positions.size(), static_cast<std::size_t>(run.n_tokens)));
    if (!status.ok()) return status;
    for (std::int32_t i = 0; i < run.n_tokens; ++i) positions.push_back(run.first_position + i);
  }
  if (static_cast<std::int64_t>(positions.size()) != n_rows) {
    return invalid_argument("the runs of a step have " + std::to_string(positions.size()) +
                            " tokens, its activations " + std::to_string(n_rows));
  }
  return ok_status();
}

}  // namespace spindle::worker
