#pragma once
// What the stages are planned from, out of a configuration.
//
// Thread-safety: pure functions.

#include "cluster/coordinator/cluster_settings.h"
#include "proto/config.pb.h"

namespace spindle::config {

// Of a complete, valid configuration (config_rules.h). CUDA is kCuda, CPU and AUTO are kCpu: what
// AUTO comes to is decided at start.
coordinator::ClusterSettings cluster_settings(const Config& config);

}  // namespace spindle::config
