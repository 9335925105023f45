#include "cluster/api/openai_kv.h"

#include <algorithm>
#include <boost/json.hpp>

namespace spindle::api {
namespace json = boost::json;

namespace {

void read_policy(FieldReader& fields, GenerateRequest& request) {
  const json::object* object = fields.object("kv_policy");
  if (object == nullptr) return;
  FieldReader inner(*object, "kv_policy.");
  KvPolicyRequest policy;
  policy.profile = inner.string("profile").value_or("");
  policy.ratio = inner.number("ratio");
  policy.max_bytes = inner.integer("max_bytes");
  policy.sinks = inner.integer("sinks");
  policy.recent = inner.integer("recent");
  policy.window = inner.integer("window");
  // A misspelt field would silently leave the KV as large as it is.
  static constexpr std::string_view kKnown[] = {"profile", "ratio",  "max_bytes",
                                                "sinks",   "recent", "window"};
  for (const auto& member : *object) {
    const std::string_view name(member.key().data(), member.key().size());
    if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown)) {
      inner.fail(name, "kv_policy has no such field");
    }
  }
  fields.keep(inner.error());
  request.kv_policy = std::move(policy);
}

template <typename Uses, typename Key>
auto& use_of(Uses& uses, std::int32_t key, Key member) {
  const auto found =
      std::find_if(uses.begin(), uses.end(), [&](const auto& use) { return use.*member == key; });
  if (found != uses.end()) return *found;
  auto& use = uses.emplace_back();
  use.*member = key;
  return use;
}

json::object bytes_object(const char* name, std::int64_t value, std::uint64_t full_bytes,
                          std::uint64_t kept_bytes) {
  return {{name, value}, {"full_bytes", full_bytes}, {"kept_bytes", kept_bytes}};
}

}  // namespace

void read_kv_fields(FieldReader& fields, GenerateRequest& request) {
  read_policy(fields, request);
  if (const json::array* positions = fields.array("compress_at")) {
    if (!read_integers(*positions, request.compress_at)) {
      fields.fail("compress_at", "compress_at must be an array of token positions");
    }
  }
  request.session_id = fields.string("session_id").value_or("");
  request.keep_session = fields.boolean("keep_session").value_or(false);
}

void add_kv_use(std::vector<engine::StageKvUse>& total,
                const std::vector<engine::StageKvUse>& more) {
  for (const engine::StageKvUse& from : more) {
    engine::StageKvUse& stage = use_of(total, from.stage, &engine::StageKvUse::stage);
    stage.full_bytes += from.full_bytes;
    stage.kept_bytes += from.kept_bytes;
    for (const engine::LayerKvUse& layer_from : from.layers) {
      engine::LayerKvUse& layer =
          use_of(stage.layers, layer_from.layer, &engine::LayerKvUse::layer);
      layer.full_bytes += layer_from.full_bytes;
      layer.kept_bytes += layer_from.kept_bytes;
    }
  }
}

void append_kv_use(std::string& out, const std::vector<engine::StageKvUse>& stages) {
  std::uint64_t full_bytes = 0;
  std::uint64_t kept_bytes = 0;
  json::array stage_list;
  for (const engine::StageKvUse& stage : stages) {
    full_bytes += stage.full_bytes;
    kept_bytes += stage.kept_bytes;
    json::object object = bytes_object("stage", stage.stage, stage.full_bytes, stage.kept_bytes);
    json::array layers;
    for (const engine::LayerKvUse& layer : stage.layers) {
      layers.emplace_back(bytes_object("layer", layer.layer, layer.full_bytes, layer.kept_bytes));
    }
    object["layers"] = std::move(layers);
    stage_list.emplace_back(std::move(object));
  }
  const double ratio =
      full_bytes == 0 ? 1.0 : static_cast<double>(kept_bytes) / static_cast<double>(full_bytes);
  out += json::serialize(json::object{{"full_bytes", full_bytes},
                                      {"kept_bytes", kept_bytes},
                                      {"ratio", ratio},
                                      {"stages", std::move(stage_list)}});
}

}  // namespace spindle::api
