#include "ops/cli/eval_config.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <boost/json.hpp>
#include <utility>

#include "ops/cli/input.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;

class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, int column, const std::string& message) override {
    if (text.empty()) {
      text = std::to_string(line + 1) + ":" + std::to_string(column + 1) + ": " + message;
    }
  }
  std::string text;
};

constexpr int kMostLayers = 4096;
constexpr int kMostHeads = 4096;

// A count of config.json; 0 when there is none.
Result<int> count(const json::object& object, const char* name, int most) {
  const json::value* value = object.if_contains(name);
  if (value == nullptr || value->is_null()) return 0;
  if (!value->is_int64() || value->as_int64() < 1 || value->as_int64() > most) {
    return invalid_argument(std::string("config.json: ") + name + " must be from 1 to " +
                            std::to_string(most));
  }
  return static_cast<int>(value->as_int64());
}

Status read_shape(const std::filesystem::path& folder, EvalModel& model) {
  const Result<std::string> text = read_text_file((folder / "config.json").string());
  if (!text.ok()) return text.status();
  boost::system::error_code error;
  const json::value value = json::parse(*text, error);
  if (error || !value.is_object()) return invalid_argument("config.json is not a JSON object");
  const auto n_layers = count(value.as_object(), "num_hidden_layers", kMostLayers);
  const auto n_heads = count(value.as_object(), "num_attention_heads", kMostHeads);
  const auto n_kv_heads = count(value.as_object(), "num_key_value_heads", kMostHeads);
  for (const auto* field : {&n_layers, &n_heads, &n_kv_heads}) {
    if (!field->ok()) return field->status();
  }
  if (*n_layers == 0 || *n_heads == 0) {
    return invalid_argument("config.json has no num_hidden_layers or no num_attention_heads");
  }
  model.n_layers = *n_layers;
  model.n_kv_heads = *n_kv_heads == 0 ? *n_heads : *n_kv_heads;
  return ok_status();
}

}  // namespace

Result<config::Config> read_config(const std::string& path) {
  const Result<std::string> text = read_text_file(path);
  if (!text.ok()) return text.status();
  config::Config config;
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  if (!parser.ParseFromString(*text, &config)) {
    return invalid_argument(path + ":" + error.text);
  }
  if (config.model().path().empty()) return invalid_argument(path + ": model.path is not set");
  const std::filesystem::path folder = std::filesystem::absolute(path).parent_path();
  config.mutable_model()->set_path((folder / config.model().path()).lexically_normal().string());
  return config;
}

Result<EvalModel> load_eval_model(const std::filesystem::path& folder) {
  EvalModel model;
  Result<std::unique_ptr<text::Tokenizer>> tokenizer = text::Tokenizer::load(folder);
  if (!tokenizer.ok()) return tokenizer.status();
  model.tokenizer = *std::move(tokenizer);
  Result<text::ModelChatTemplate> chat_template = text::load_chat_template(folder);
  if (!chat_template.ok()) return chat_template.status();
  model.chat_template = *std::move(chat_template);
  if (Status status = read_shape(folder, model); !status.ok()) return status;
  // "models/mini/" has no last part of its own.
  model.name = (folder.has_filename() ? folder : folder.parent_path()).filename().string();
  return model;
}

}  // namespace spindle::cli
