#pragma once
// The policy of a configuration as the planner's value: the one place where its names become
// enumerators.
//
// Thread-safety: pure functions.

#include "kernels/core/status.h"
#include "kvstore/plan/kv_plan.h"
#include "proto/config.pb.h"

namespace spindle::config {

// INVALID_ARGUMENT naming the key at fault ("kv.policy.profile") and what is valid. Ranges of
// integers are config_rules.h's; whether the model can do it is the planner's to judge.
Result<kvstore::KvPolicy> to_kv_policy(const KvPolicy& policy);

}  // namespace spindle::config
