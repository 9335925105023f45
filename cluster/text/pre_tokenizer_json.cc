#include "cluster/text/pre_tokenizer_json.h"

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace spindle::text {
namespace {

using boost::json::value;

struct Pipeline {
  std::vector<SplitStep> steps;
  bool has_byte_level = false;
  bool add_prefix_space = false;
  std::optional<SplitPattern> byte_level_split;
};

Result<SplitBehavior> parse_behavior(std::string_view name, const std::string& path) {
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  return unimplemented(path + " " + std::string(name));
}

Result<SplitPattern> parse_pattern(const JsonFields& step) {
  const auto pattern = step.object("pattern");
  if (!pattern.ok()) return pattern.status();
  const bool is_regex = pattern->find("Regex") != nullptr;
  const auto source = pattern->string(is_regex ? "Regex" : "String");
  if (!source.ok()) return source.status();
  auto compiled =
      is_regex ? SplitPattern::compile(*source) : SplitPattern::compile_literal(*source);
  if (!compiled.ok()) return compiled.status().with_context(pattern->path());
  return compiled;
}

Status read_split(const JsonFields& step, Pipeline& pipeline) {
  auto pattern = parse_pattern(step);
  if (!pattern.ok()) return pattern.status();
  const auto name = step.string("behavior");
  if (!name.ok()) return name.status();
  const auto behavior = parse_behavior(*name, step.path_of("behavior"));
  if (!behavior.ok()) return behavior.status();
  const auto invert = step.boolean("invert", false);
  if (!invert.ok()) return invert.status();
  pipeline.steps.push_back({*std::move(pattern), *behavior, *invert});
  return {};
}

Status read_digits(const JsonFields& step, Pipeline& pipeline) {
  const auto individual = step.boolean("individual_digits", false);
  if (!individual.ok()) return individual.status();
  auto pattern = SplitPattern::compile(R"(\p{N})");
  if (!pattern.ok()) return pattern.status();
  pipeline.steps.push_back({*std::move(pattern),
                            *individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
                            false});
  return {};
}

Status read_byte_level(const JsonFields& step, Pipeline& pipeline) {
  const auto add_prefix_space = step.boolean("add_prefix_space", true);
  if (!add_prefix_space.ok()) return add_prefix_space.status();
  const auto use_regex = step.boolean("use_regex", true);
  if (!use_regex.ok()) return use_regex.status();
  pipeline.has_byte_level = true;
  pipeline.add_prefix_space = *add_prefix_space;
  if (*use_regex) {
    auto pattern = SplitPattern::compile(byte_level_pattern());
    if (!pattern.ok()) return pattern.status();
    pipeline.byte_level_split = *std::move(pattern);
  }
  return {};
}

Status read_step(const value& step, const std::string& path, Pipeline& pipeline) {
  const auto fields = JsonFields::of(step, path);
  if (!fields.ok()) return fields.status();
  if (pipeline.has_byte_level) return unimplemented(path + ": a step after ByteLevel");
  const auto type = fields->string("type");
  if (!type.ok()) return type.status();
  if (*type == "Split") return read_split(*fields, pipeline);
  if (*type == "Digits") return read_digits(*fields, pipeline);
  if (*type == "ByteLevel") return read_byte_level(*fields, pipeline);
  return unimplemented(path + ".type " + std::string(*type));
}

Status read_steps(const JsonFields& pre_tokenizer, Pipeline& pipeline) {
  const auto steps = pre_tokenizer.array("pretokenizers");
  if (!steps.ok()) return steps.status();
  for (std::size_t i = 0; i < (*steps)->size(); ++i) {
    const std::string path = pre_tokenizer.path_of("pretokenizers[" + std::to_string(i) + "]");
    const Status status = read_step((**steps)[i], path, pipeline);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

Result<PreTokenizer> read_pre_tokenizer(const JsonFields& root) {
  const auto pre_tokenizer = root.object("pre_tokenizer");
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  const auto type = pre_tokenizer->string("type");
  if (!type.ok()) return type.status();
  Pipeline pipeline;
  const Status status = *type == "Sequence"
                            ? read_steps(*pre_tokenizer, pipeline)
                            : read_step(*root.find("pre_tokenizer"), "pre_tokenizer", pipeline);
  if (!status.ok()) return status;
  if (!pipeline.has_byte_level) {
    return unimplemented("a pre_tokenizer without ByteLevel; only byte-level tokenizers load");
  }
  return PreTokenizer(std::move(pipeline.steps), pipeline.add_prefix_space,
                      std::move(pipeline.byte_level_split));
}

}  // namespace spindle::text
