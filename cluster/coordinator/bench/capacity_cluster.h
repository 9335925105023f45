#pragma once
// The clusters of the capacity study: a model's shape and a device's rates become the simulation's
// stages, pools and step times. Pure functions.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/coordinator/simulation/simulation.h"
#include "kernels/core/status.h"

namespace spindle::coordinator::bench {

// A decoder-only transformer with grouped-query attention and a gated feed-forward, in 16 bit.
struct ModelShape {
  std::string name;
  int n_layers = 0;
  int hidden = 0;
  int intermediate = 0;
  int n_heads = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;

  double layer_parameters() const;
  double head_parameters() const { return static_cast<double>(vocab_size) * hidden; }
};
// "8b" and "70b": those of models/shapes, the second with all of its 80 layers.
Result<ModelShape> model_shape(std::string_view name);

// What a device reaches, not what its data sheet says.
struct DeviceRates {
  double read_bytes_per_us = 0;
  double flops_per_us = 0;            // matrix products
  double attention_flops_per_us = 0;  // of prefill
  double launch_us = 0;               // of a stage's step
  double link_bytes_per_us = 0;       // activations, to the next stage
  double link_us = 0;
  double control_us = 0;  // a plan or a result
};
DeviceRates h200_rates();

enum class Memories : std::uint8_t {
  kEqual,
  kOneThird,  // the device in the middle has a third of the others' memory
  kUneven,    // every device a random share from 0.5 to 1
};
std::string_view memories_name(Memories memories);

struct CapacitySettings {
  ModelShape shape;
  DeviceRates rates;
  int n_stages = 0;
  Memories memories = Memories::kEqual;
  std::uint64_t memory_bytes = 0;  // of one device
  std::int64_t max_model_len = 0;
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  std::int32_t mean_output = 0;  // tokens, geometric
  kvstore::KvPolicy policy;      // of all requests
  bool balances = false;
  std::int64_t typical_tokens = 0;  // of a prompt, for the balancer
  std::uint64_t seed = 0;
};

// Layers are divided as the daemon does it (layer_partition.h), by time and memory. The status of
// that, when there are more stages than layers or weights leave no room for a sequence of full
// length; INVALID_ARGUMENT when balancing is asked for and the policy has no levels.
Result<simulation::SimulationConfig> capacity_cluster(const CapacitySettings& settings);

}  // namespace spindle::coordinator::bench
