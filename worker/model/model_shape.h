#pragma once
// A model's sizes, as the planning of stages wants them.
//
// Thread-safety: pure.

#include "cluster/coordinator/cluster_settings.h"
#include "worker/model/model_config.h"

namespace spindle::model {

// Dummy weights have 16 bits whatever config.json says.
coordinator::ModelShape model_shape(const ModelConfig& model, bool dummy_weights);

}  // namespace spindle::model
