#include "worker/config/config_rules.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <string>

#include "worker/config/kv_policy.h"

namespace spindle::config {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr std::int64_t kMiB = std::int64_t{1} << 20;
constexpr std::int64_t kGiB = std::int64_t{1} << 30;
constexpr std::int64_t kDayMs = 24LL * 3600 * 1000;

constexpr auto kRanges = std::to_array<IntegerRange>({
    {"model.max_model_len", 1, 1 << 24},
    {"cluster.layers_per_stage", 1, 4096},
    {"cluster.micro_batches", 1, 256},
    {"cluster.step_timeout_ms", 100, kDayMs},
    {"cluster.peer_timeout_ms", 100, kDayMs},
    {"cluster.startup_timeout_ms", 1000, kDayMs},
    {"cluster.device_memory_bytes", kMiB, 1024 * 1024 * kGiB},
    {"compute.threads_per_rank", 1, 1024},
    {"kv.memory_bytes", kMiB, 1024 * 1024 * kGiB},
    {"kv.policy.max_bytes", 1, std::int64_t{1} << 60},
    {"kv.policy.sinks", 0, 64},
    {"kv.policy.recent", 0, 1 << 24},
    {"kv.policy.window", 1, 1 << 24},
    {"kv.policy.overrides.first_layer", 0, 4095},
    {"kv.policy.overrides.last_layer", 0, 4095},
    {"kv.policy.overrides.kv_head", -1, 4095},
    {"kv.policy.overrides.window", 1, 1 << 24},
    {"kv.max_sessions", 0, 1 << 20},
    {"kv.session_ttl_ms", 1, kDayMs},
    {"kv.max_session_bytes", 0, 1024 * 1024 * kGiB},
    {"kv.layer0_table_bytes", 0, 1024 * 1024 * kGiB},
    {"kv.balance.n_lighter", 0, 32},
    {"kv.balance.n_stronger", 0, 95},
    {"kv.balance.typical_tokens", 1, 1 << 24},
    {"kv.balance.report_steps", 1, 1 << 20},
    {"kv.balance.warmup_ms", 0, kDayMs},
    {"kv.balance.cooldown_ms", 0, kDayMs},
    {"kv.balance.relief_hold_ms", 0, kDayMs},
    {"scheduler.max_num_seqs", 1, 65536},
    {"scheduler.max_num_batched_tokens", 1, 1 << 24},
    {"scheduler.max_num_queued_reqs", 0, 1 << 24},
    {"scheduler.max_num_queued_tokens", 0, std::int64_t{1} << 40},
    {"scheduler.max_queued_kv_bytes", 0, std::int64_t{1} << 50},
    {"api.http.port", 1, 65535},
    {"api.tcp.port", 1, 65535},
    {"api.limits.max_connections", 1, 1 << 20},
    {"api.limits.max_body_bytes", 1024, kGiB},
    {"api.limits.max_frame_bytes", 1024, kGiB},
    {"api.limits.max_requests_per_connection", 1, 1 << 20},
    {"api.limits.max_n", 1, 1024},
    {"api.limits.max_logprobs", 0, 1024},
    {"api.limits.max_stop_strings", 0, 1024},
    {"api.limits.max_stop_bytes", 1, 65536},
    {"api.limits.max_logit_bias", 0, 1 << 20},
    {"api.limits.read_timeout_ms", 1, kDayMs},
    {"api.limits.idle_timeout_ms", 1, kDayMs},
    {"api.limits.max_buffered_bytes", 1024, kGiB},
    {"api.limits.write_timeout_ms", 1, kDayMs},
    {"api.limits.max_compress_points", 1, 64},
    {"api.limits.max_score_tokens", 0, 1 << 24},
    {"api.limits.max_dense_scores", 0, 1 << 20},
    {"api.io_threads", 1, 256},
    {"api.tokenizer_threads", 1, 256},
    {"api.drain_timeout_ms", 0, kDayMs},
    {"log.summary_interval_ms", 0, kDayMs},
    {"log.max_prompt_bytes", 1, kMiB},
});

bool is_group(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
}

// Copies a default of the schema into the field, so that it is printed and compared.
void set_to_default(Message& message, const FieldDescriptor* field) {
  const Reflection* reflection = message.GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return reflection->SetInt32(&message, field, field->default_value_int32());
    case FieldDescriptor::CPPTYPE_INT64:
      return reflection->SetInt64(&message, field, field->default_value_int64());
    case FieldDescriptor::CPPTYPE_UINT32:
      return reflection->SetUInt32(&message, field, field->default_value_uint32());
    case FieldDescriptor::CPPTYPE_UINT64:
      return reflection->SetUInt64(&message, field, field->default_value_uint64());
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return reflection->SetDouble(&message, field, field->default_value_double());
    case FieldDescriptor::CPPTYPE_FLOAT:
      return reflection->SetFloat(&message, field, field->default_value_float());
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection->SetBool(&message, field, field->default_value_bool());
    case FieldDescriptor::CPPTYPE_ENUM:
      return reflection->SetEnum(&message, field, field->default_value_enum());
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection->SetString(&message, field, field->default_value_string());
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return;
  }
}

// The schema's groups are nested a few deep and never contain themselves.
void fill_group(Message& message) {
  const Descriptor* type = message.GetDescriptor();
  const Reflection* reflection = message.GetReflection();
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    if (field->is_repeated()) {
      const int count = is_group(*field) ? reflection->FieldSize(message, field) : 0;
      for (int k = 0; k < count; ++k) {
        fill_group(*reflection->MutableRepeatedMessage(&message, field, k));
      }
      continue;
    }
    if (is_group(*field)) {
      fill_group(*reflection->MutableMessage(&message, field));
    } else if (field->has_default_value() && !reflection->HasField(message, field)) {
      set_to_default(message, field);
    }
  }
}

const IntegerRange* find_range(std::string_view path) {
  const auto at = std::find_if(kRanges.begin(), kRanges.end(),
                               [path](const IntegerRange& range) { return range.path == path; });
  return at == kRanges.end() ? nullptr : &*at;
}

Status check_integer(const std::string& path, std::int64_t value) {
  const IntegerRange* range = find_range(path);
  if (range == nullptr || (value >= range->least && value <= range->most)) return ok_status();
  return invalid_argument(path + " must be from " + std::to_string(range->least) + " to " +
                          std::to_string(range->most) + ", got " + std::to_string(value));
}

Status check_string(const std::string& path, const std::string& value) {
  const auto is_control = [](char c) {
    return static_cast<unsigned char>(c) < 0x20 || c == '\x7f';
  };
  if (value.size() > 4096) return invalid_argument(path + " is longer than 4096 bytes");
  if (std::any_of(value.begin(), value.end(), is_control)) {
    return invalid_argument(path + " contains a control character");
  }
  return ok_status();
}

// Every value that is set, one at a time.
Status check_field(const Message& message, const FieldDescriptor* field, const std::string& path) {
  const Reflection* reflection = message.GetReflection();
  const bool repeated = field->is_repeated();
  const int count = repeated ? reflection->FieldSize(message, field)
                             : static_cast<int>(reflection->HasField(message, field));
  for (int i = 0; i < count; ++i) {
    Status status;
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT32) {
      status = check_integer(path, repeated ? reflection->GetRepeatedInt32(message, field, i)
                                            : reflection->GetInt32(message, field));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_INT64) {
      status = check_integer(path, repeated ? reflection->GetRepeatedInt64(message, field, i)
                                            : reflection->GetInt64(message, field));
    } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
      status = check_string(path, repeated ? reflection->GetRepeatedString(message, field, i)
                                           : reflection->GetString(message, field));
    }
    if (!status.ok()) return status;
  }
  return ok_status();
}

Status check_group(const Message& message, const std::string& prefix);

// The group, or each group of a list.
Status check_groups(const Message& message, const FieldDescriptor* field,
                    const std::string& prefix) {
  const Reflection* reflection = message.GetReflection();
  if (!field->is_repeated()) return check_group(reflection->GetMessage(message, field), prefix);
  for (int i = 0; i < reflection->FieldSize(message, field); ++i) {
    const Status status = check_group(reflection->GetRepeatedMessage(message, field, i), prefix);
    if (!status.ok()) return status;
  }
  return ok_status();
}

Status check_group(const Message& message, const std::string& prefix) {
  const Descriptor* type = message.GetDescriptor();
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const std::string path = prefix + field->name();
    const Status status = is_group(*field) ? check_groups(message, field, path + ".")
                                           : check_field(message, field, path);
    if (!status.ok()) return status;
  }
  return ok_status();
}

Status check_api(const Api& api) {
  const double ratio = api.limits().min_kv_ratio();
  if (!(ratio > 0 && ratio <= 1)) {
    return invalid_argument("api.limits.min_kv_ratio must be above 0 and at most 1, got " +
                            std::to_string(ratio));
  }
  if (!api.http().enabled() && !api.tcp().enabled()) {
    return invalid_argument(
        "api.http.enabled and api.tcp.enabled are both false: nobody could reach the server");
  }
  if (api.http().host().empty()) return invalid_argument("api.http.host is empty");
  if (api.tcp().host().empty()) return invalid_argument("api.tcp.host is empty");
  if (api.http().enabled() && api.tcp().enabled() && api.http().port() == api.tcp().port() &&
      api.http().host() == api.tcp().host()) {
    return invalid_argument("api.http.port and api.tcp.port are both " +
                            std::to_string(api.http().port()));
  }
  for (const std::string& key : api.api_key()) {
    if (key.empty()) return invalid_argument("api.api_key holds an empty key");
    if (key == kHiddenKey) {
      return invalid_argument(
          "api.api_key is the placeholder that --print-config prints; "
          "put the real key there");
    }
  }
  return ok_status();
}

}  // namespace

std::span<const IntegerRange> integer_ranges() { return kRanges; }

void fill_defaults(Config& config) {
  fill_group(config);
  Model* model = config.mutable_model();
  if (!model->has_served_model_name() && !model->path().empty()) {
    std::filesystem::path path(model->path());
    if (!path.has_filename()) path = path.parent_path();
    model->set_served_model_name(path.filename().string());
  }
}

Status validate_config(const Config& config) {
  if (config.model().path().empty()) {
    return invalid_argument(
        "model.path is not set: name a Hugging Face folder in the configuration file or with "
        "--model");
  }
  if (config.model().has_served_model_name() && config.model().served_model_name().empty()) {
    return invalid_argument("model.served_model_name is empty");
  }
  if (const Status status = check_group(config, ""); !status.ok()) return status;
  const double share = config.compute().gpu_memory_utilization();
  if (!(share > 0 && share <= 1)) {
    return invalid_argument("compute.gpu_memory_utilization must be above 0 and at most 1, got " +
                            std::to_string(share));
  }
  const Balance& balance = config.kv().balance();
  if (!(balance.level_step() > 0 && balance.level_step() < 1)) {
    return invalid_argument("kv.balance.level_step must be above 0 and below 1, got " +
                            std::to_string(balance.level_step()));
  }
  if (!(balance.relief_margin() > 0 && balance.relief_margin() <= 10)) {
    return invalid_argument("kv.balance.relief_margin must be above 0 and at most 10, got " +
                            std::to_string(balance.relief_margin()));
  }
  if (const auto policy = to_kv_policy(config.kv().policy()); !policy.ok()) return policy.status();
  return check_api(config.api());
}

}  // namespace spindle::config
