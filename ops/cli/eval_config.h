#pragma once
// What `spindle eval` needs from the cluster's configuration and from the model's folder.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "cluster/text/chat_template.h"
#include "cluster/text/tokenizer.h"
#include "kernels/core/status.h"
#include "proto/config.pb.h"

namespace spindle::cli {

// A configuration file with model.path made absolute. Only its form is checked: ranges are
// spindled's business.
Result<config::Config> read_config(const std::string& path);

struct EvalModel {
  std::unique_ptr<text::Tokenizer> tokenizer;
  std::optional<text::ModelChatTemplate> chat_template;  // always set
  std::string name;                                      // of its folder
  int n_layers = 0;
  int n_kv_heads = 0;
};
// The parts of a Hugging Face folder without its weights.
Result<EvalModel> load_eval_model(const std::filesystem::path& folder);

}  // namespace spindle::cli
