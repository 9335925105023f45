#pragma once
// Spindle's own fields of an OpenAI request and of its usage: what a request says about its KV, and
// what became of it.

#include <cstdint>
#include <string>
#include <vector>

#include "cluster/api/completion.h"
#include "cluster/api/json_fields.h"
#include "cluster/engine/engine.h"

namespace spindle::api {

// Reads "kv_policy", "compress_at", "session_id" and "keep_session". Types only; ranges are in
// kv_validation.h.
void read_kv_fields(FieldReader& fields, GenerateRequest& request);

// Adds a request's stages to those of the requests before it, stage by stage and layer by layer.
void add_kv_use(std::vector<engine::StageKvUse>& total,
                const std::vector<engine::StageKvUse>& more);

// {"full_bytes", "kept_bytes", "ratio", "stages": [{"stage", "full_bytes", "kept_bytes", "layers":
// [{"layer", "full_bytes", "kept_bytes"}]}]}. The ratio of nothing is 1.
void append_kv_use(std::string& out, const std::vector<engine::StageKvUse>& stages);

}  // namespace spindle::api
