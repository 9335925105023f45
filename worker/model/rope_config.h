#pragma once
// Reading of the rotary embedding's fields of config.json; part of parse_model_config.

#include <string>

#include "worker/model/json_fields.h"
#include "worker/model/model_config.h"

namespace spindle::model {

// Fills config.rope from "rope_theta" with "rope_scaling", or from "rope_parameters". Failures go
// to `fields`; fields of those objects that have no effect go to config.unknown_fields.
void read_rope(FieldReader& fields, ModelConfig& config);

// Adds to config.unknown_fields, up to a limit.
void add_unknown_field(ModelConfig& config, const std::string& name);

}  // namespace spindle::model
