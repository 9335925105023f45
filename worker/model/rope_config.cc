#include "worker/model/rope_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "worker/model/printable.h"

namespace spindle::model {
namespace {

namespace json = boost::json;

constexpr std::size_t kMaxUnknownFields = 64;
constexpr NumberRange kThetaRange{1, 1e12, true};
constexpr NumberRange kFactorRange{1, 1e6, false};

// "rope_type", or "type" as it was called before; "default" when neither is given.
std::string rope_type(FieldReader& rope) {
  const auto newer = rope.string("rope_type");
  const auto older = rope.string("type");
  if (newer && older && *newer != *older) {
    rope.fail(invalid_argument(rope.name_of("rope_type") + " is " + in_quotes(*newer) + " but " +
                               rope.name_of("type") + " is " + in_quotes(*older)));
  }
  return newer ? *newer : older.value_or("default");
}

template <typename T>
T required(FieldReader& rope, std::string_view field, const std::optional<T>& value) {
  if (!value) rope.fail(invalid_argument(rope.name_of(field) + " is missing"));
  return value.value_or(T{1});
}

void read_llama3(FieldReader& rope, RopeConfig& config) {
  constexpr NumberRange kFrequencyFactor{0, 1e6, true};
  config.low_freq_factor =
      required(rope, "low_freq_factor", rope.number("low_freq_factor", kFrequencyFactor));
  config.high_freq_factor =
      required(rope, "high_freq_factor", rope.number("high_freq_factor", kFrequencyFactor));
  config.original_max_position_embeddings =
      required(rope, "original_max_position_embeddings",
               rope.integer("original_max_position_embeddings", 1, kMaxPositions));
  if (rope.status().ok() && config.high_freq_factor <= config.low_freq_factor) {
    rope.fail(invalid_argument(rope.name_of("high_freq_factor") + " must be greater than " +
                               rope.name_of("low_freq_factor")));
  }
}

std::span<const std::string_view> rope_fields(RopeConfig::Scaling scaling) {
  static constexpr std::array<std::string_view, 8> kFields = {"rope_theta",
                                                              "rope_type",
                                                              "type",
                                                              "partial_rotary_factor",
                                                              "factor",
                                                              "low_freq_factor",
                                                              "high_freq_factor",
                                                              "original_max_position_embeddings"};
  switch (scaling) {
    case RopeConfig::Scaling::kNone:
      return std::span(kFields).first(4);
    case RopeConfig::Scaling::kLinear:
      return std::span(kFields).first(5);
    case RopeConfig::Scaling::kLlama3:
      break;
  }
  return kFields;
}

// Reads the object named `where`: "rope_scaling" or the newer "rope_parameters".
Status read_rope_object(const json::object& object, const std::string& where, ModelConfig& config) {
  FieldReader rope(object, where + ".");
  RopeConfig& out = config.rope;
  const std::string type = rope_type(rope);
  if (type == "linear") {
    out.scaling = RopeConfig::Scaling::kLinear;
  } else if (type == "llama3") {
    out.scaling = RopeConfig::Scaling::kLlama3;
  } else if (type != "default") {
    rope.fail(unimplemented(rope.name_of("rope_type") + " is " + in_quotes(type) +
                            "; supported: \"default\", \"linear\", \"llama3\""));
  }
  const json::value* partial = rope.find("partial_rotary_factor");
  if (partial != nullptr && !is_number(*partial, 1)) {
    rope.fail(refuse_value(rope.name_of("partial_rotary_factor"), *partial, "1"));
  }
  if (out.scaling != RopeConfig::Scaling::kNone) {
    out.factor = required(rope, "factor", rope.number("factor", kFactorRange));
  }
  if (out.scaling == RopeConfig::Scaling::kLlama3) read_llama3(rope, out);
  out.theta = rope.number("rope_theta", kThetaRange).value_or(out.theta);
  const auto known = rope_fields(out.scaling);
  for (const auto& field : object) {
    const std::string_view name(field.key().data(), field.key().size());
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      add_unknown_field(config, where + "." + std::string(name));
    }
  }
  return rope.status();
}

// The wavelength-dependent scaling of Llama 3.1: long wavelengths are stretched by `factor`, short
// ones kept, those between interpolated.
float scale_llama3(float inv_freq, const RopeConfig& rope) {
  const auto old_length = static_cast<double>(rope.original_max_position_embeddings);
  const auto low_wavelength = static_cast<float>(old_length / rope.low_freq_factor);
  const auto high_wavelength = static_cast<float>(old_length / rope.high_freq_factor);
  const float wavelength = (1.0f / inv_freq) * static_cast<float>(2.0 * std::numbers::pi);
  if (wavelength > low_wavelength) return inv_freq / rope.factor;
  if (wavelength < high_wavelength) return inv_freq;
  const float smooth =
      ((1.0f / wavelength) * static_cast<float>(old_length) - rope.low_freq_factor) /
      (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0f - smooth) * inv_freq / rope.factor + smooth * inv_freq;
}

}  // namespace

void read_rope(FieldReader& fields, ModelConfig& config) {
  const json::value* scaling = fields.find("rope_scaling");
  const json::value* parameters = fields.find("rope_parameters");
  if (scaling != nullptr && parameters != nullptr && *scaling != *parameters) {
    return fields.fail(
        invalid_argument("\"rope_scaling\" and \"rope_parameters\" are both given and differ"));
  }
  const auto outer_theta = fields.number("rope_theta", kThetaRange);
  config.rope.theta = outer_theta.value_or(10000.0f);
  const std::string where = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const json::value* object = parameters != nullptr ? parameters : scaling;
  if (object == nullptr) return;
  if (!object->is_object()) {
    return fields.fail(
        invalid_argument(in_quotes(where) + " must be an object or null, got " + show(*object)));
  }
  fields.fail(read_rope_object(object->get_object(), where, config));
  if (outer_theta && *outer_theta != config.rope.theta) {
    fields.fail(invalid_argument("\"rope_theta\" is " + show(json::value(*outer_theta)) + " but " +
                                 in_quotes(where + ".rope_theta") + " is " +
                                 show(json::value(config.rope.theta))));
  }
}

void add_unknown_field(ModelConfig& config, const std::string& name) {
  if (config.unknown_fields.size() < kMaxUnknownFields) {
    const std::string shown = in_quotes(name);
    config.unknown_fields.push_back(shown.substr(1, shown.size() - 2));
  }
}

std::vector<float> rope_inv_freq(const ModelConfig& config) {
  std::vector<float> result(static_cast<std::size_t>(config.head_dim / 2));
  for (std::size_t i = 0; i < result.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float inv_freq = 1.0f / std::pow(config.rope.theta, exponent);
    switch (config.rope.scaling) {
      case RopeConfig::Scaling::kNone:
        result[i] = inv_freq;
        break;
      case RopeConfig::Scaling::kLinear:
        result[i] = inv_freq / config.rope.factor;
        break;
      case RopeConfig::Scaling::kLlama3:
        result[i] = scale_llama3(inv_freq, config.rope);
        break;
    }
  }
  return result;
}

}  // namespace spindle::model
