#include "cluster/coordinator/sizing.h"

#include <algorithm>
#include <utility>

#include "cluster/coordinator/request_demand.h"
#include "cluster/coordinator/stage_costs.h"
#include "kvstore/plan/device_layout.h"
#include "kvstore/plan/expected_use.h"

namespace spindle::coordinator {
namespace {

using kvstore::kGeneratedBoundary;

int ranks_on(const std::string& device, std::span<const DeviceFacts> devices) {
  return static_cast<int>(
      std::count_if(devices.begin(), devices.end(),
                    [&](const DeviceFacts& other) { return other.id == device; }));
}

std::uint64_t gpu_pool(const ClusterDescription& cluster, const StagePlan& plan,
                       const StageSizing& stage, std::size_t index) {
  const StageDevice& device = plan.devices[index];
  const DeviceFacts& facts = cluster.devices[index];
  const bool is_stated = !cluster.settings.device_memory_bytes.empty();
  const auto used =
      static_cast<std::uint64_t>(stage.predicted.weight_bytes + stage.workspace_bytes);
  const std::uint64_t total =
      facts.total_bytes > 0 ? facts.total_bytes : static_cast<std::uint64_t>(device.memory_bytes);
  return gpu_pool_bytes(
      {.total_bytes = total,
       .free_at_start = total,
       .free_now = total - std::min(total, used),
       .scratch_bytes = static_cast<std::uint64_t>(stage.scratch_bytes),
       .stated_bytes = is_stated ? static_cast<std::uint64_t>(device.memory_bytes) : 0,
       .planned_bytes = used,
       .utilization = cluster.settings.gpu_memory_utilization,
       .ranks_here = ranks_on(facts.id, cluster.devices)});
}

bool has_policy(const kvstore::KvPolicy& policy) {
  return policy.profile != kvstore::KvProfile::kFull || !policy.overrides.empty();
}

std::int64_t most_tokens(const RequestKind& kind) {
  return most_cached_tokens(kind.prompt_tokens, kind.output_tokens);
}

kvstore::ExpectedUse use_at(const ClusterSizing& sizing, const RequestKind& kind,
                            const kvstore::SequencePlan& plan, const LayerRange& layers,
                            std::int64_t n_generated) {
  const std::int64_t n_tokens = kind.prompt_tokens + n_generated;
  const std::int64_t granted =
      std::min(most_tokens(kind), next_boundary_after(kind.prompt_tokens, n_tokens));
  return kvstore::expected_use(plan, sizing.kv_model, kind.table, {layers.first, layers.count},
                               kind.prompt_tokens, n_generated, granted);
}

// Generated tokens in the cache at the output's last boundary.
std::int64_t last_boundary(const RequestKind& kind) {
  return (kind.output_tokens - 1) / kGeneratedBoundary * kGeneratedBoundary;
}

Status check_lengths(const RequestKind& kind, std::int64_t max_model_len) {
  if (kind.prompt_tokens < 1 || kind.output_tokens < 1) {
    return invalid_argument("a request has at least one token of prompt and one of output");
  }
  if (kind.prompt_tokens > max_model_len - kind.output_tokens) {
    return invalid_argument("a prompt of " + std::to_string(kind.prompt_tokens) +
                            " tokens and an output of " + std::to_string(kind.output_tokens) +
                            " are longer than max_model_len, " + std::to_string(max_model_len));
  }
  return ok_status();
}

RequestUse use_of(const ClusterSizing& sizing, const RequestKind& kind,
                  const kvstore::SequencePlan& plan, const StageSizing& stage) {
  const std::int64_t first_grant =
      std::min(most_tokens(kind), next_boundary_after(kind.prompt_tokens, kind.prompt_tokens));
  const auto demand = [&](std::int64_t granted) {
    return request_demand({.n_before_output = kind.prompt_tokens,
                           .granted = granted,
                           .n_boundaries = has_policy(kind.policy) ? 1 : 0,
                           .last_boundary = has_policy(kind.policy) ? kind.prompt_tokens : 0,
                           .sinks = kind.policy.sinks,
                           .recent = kind.policy.recent});
  };
  const auto reserve = [&](std::int64_t granted) {
    return kvstore::reserve_pages(sizing.shape, stage.capacity.n_layers, demand(granted), false);
  };
  const LayerRange& layers = stage.predicted.layers;
  RequestUse use;
  use.alone_pages = reserve(most_tokens(kind));
  use.admission_pages = reserve(first_grant);
  use.tokens_ahead = tokens_ahead_of(demand(first_grant), most_tokens(kind));
  use.prefill_pages = kvstore::stage_pages(sizing.shape, layers.count, kind.prompt_tokens);
  const std::int64_t last = last_boundary(kind);
  const kvstore::ExpectedUse at_prompt = use_at(sizing, kind, plan, layers, 0);
  const kvstore::ExpectedUse at_last = use_at(sizing, kind, plan, layers, last);
  use.prompt_bytes = at_prompt.bytes;
  use.final_bytes = at_last.bytes;
  // It only grows from boundary to boundary, but has less to come after the last one.
  use.held_pages = std::max(at_prompt.held_pages(), at_last.held_pages());
  if (last > kGeneratedBoundary) {
    const auto before = use_at(sizing, kind, plan, layers, last - kGeneratedBoundary);
    use.held_pages = std::max(use.held_pages, before.held_pages());
  }
  return use;
}

}  // namespace

Result<ClusterSizing> size_cluster(const ClusterDescription& cluster) {
  if (cluster.devices.empty()) return invalid_argument("a cluster without a device");
  const kvstore::KvShape shape{cluster.model.n_kv_heads, cluster.model.head_dim,
                               cluster.settings.kv_dtype};
  const bool on_gpu = cluster.settings.device == ComputeDevice::kCuda;
  if (on_gpu) {
    Status known = kvstore::check_device_layout(shape);
    if (known.ok()) known = kvstore::check_device_heads(shape, cluster.model.n_heads);
    if (!known.ok()) return known;
  }
  const auto plan = plan_stages(cluster.settings, cluster.model, cluster.devices);
  if (!plan.ok()) return plan.status();
  ClusterSizing sizing;
  sizing.max_model_len = plan->max_model_len;
  sizing.shape = shape;
  sizing.kv_model = make_kv_model(cluster.model, cluster.settings.kv_dtype, plan->max_model_len,
                                  has_token_table(cluster.settings, cluster.model));
  sizing.slowest = plan->partition.slowest;
  const auto n_ranks = static_cast<int>(cluster.devices.size());
  for (std::size_t i = 0; i < cluster.devices.size(); ++i) {
    const StageDevice& device = plan->devices[i];
    StageSizing stage;
    stage.predicted = plan->partition.stages[i];
    const int n_layers = stage.predicted.layers.count;
    stage.memory_bytes = device.memory_bytes;
    stage.workspace_bytes = device.workspace_bytes;
    stage.kv_bytes_per_token =
        sizing.shape.token_bytes() * static_cast<std::uint64_t>(sizing.shape.n_kv_heads * n_layers);
    const std::uint64_t least =
        one_sequence_bytes(cluster.settings, cluster.model, plan->max_model_len, n_layers);
    if (!on_gpu) {
      stage.kv_pool_bytes =
          cpu_pool_bytes(device, stage.predicted, least, cluster.settings.max_num_seqs, 0, n_ranks);
    } else if (device.memory_bytes == 0 && device.kv_bytes == 0) {
      return invalid_argument("the memory of GPU " + std::to_string(i) + " is not known");
    } else {
      stage.scratch_bytes = gpu_scratch_bytes(cluster.model, plan->max_model_len, n_layers);
      stage.pool_is_estimate = device.kv_bytes == 0;
      stage.kv_pool_bytes = stage.pool_is_estimate ? gpu_pool(cluster, *plan, stage, i)
                                                   : static_cast<std::uint64_t>(device.kv_bytes);
    }
    if (on_gpu && stage.kv_pool_bytes >= kvstore::kMostDevicePoolBytes) {
      return invalid_argument("stage " + std::to_string(i) + " has a KV pool of " +
                              std::to_string(stage.kv_pool_bytes) +
                              " bytes; on a GPU it is of less than 256 GiB: set kv.memory_bytes");
    }
    if (stage.kv_pool_bytes < least) {
      return resource_exhausted(
          "stage " + std::to_string(i) + " has " + std::to_string(stage.kv_pool_bytes) +
          " bytes left for KV, one sequence of max_model_len " +
          std::to_string(plan->max_model_len) + " takes " + std::to_string(least) + ": it lacks " +
          std::to_string(least - stage.kv_pool_bytes));
    }
    stage.capacity = {n_layers,
                      static_cast<std::int64_t>(stage.kv_pool_bytes / sizing.shape.page_bytes())};
    sizing.stages.push_back(stage);
  }
  return sizing;
}

std::int64_t requests_that_fit(const kvstore::KvShape& shape, const StageCapacity& stage,
                               const RequestUse& use) {
  const std::int64_t last = std::max(use.admission_pages, use.held_pages);
  const auto fits = [&](std::int64_t n) {
    return (n - 1) * use.held_pages + last +
               headroom_pages(shape, stage, (n - 1) * use.tokens_ahead) <=
           stage.n_pages;
  };
  if (use.alone_pages > stage.n_pages) return 0;
  std::int64_t most = 0;
  std::int64_t too_many = stage.n_pages / std::max<std::int64_t>(use.held_pages, 1) + 2;
  while (too_many - most > 1) {
    const std::int64_t n = most + (too_many - most) / 2;
    (fits(n) ? most : too_many) = n;
  }
  return most;
}

Result<RequestSizing> size_requests(const ClusterDescription& cluster, const ClusterSizing& sizing,
                                    const RequestKind& kind) {
  if (Status status = check_lengths(kind, sizing.max_model_len); !status.ok()) return status;
  if (has_policy(kind.policy)) {
    const Status status =
        kvstore::validate_policy(kind.policy, sizing.kv_model, kind.prompt_tokens, kind.table);
    if (!status.ok()) return status;
  }
  RequestSizing out;
  if (has_policy(kind.policy)) {
    auto plan =
        kvstore::expected_plan(kind.policy, sizing.kv_model, kind.table, kind.prompt_tokens);
    if (!plan.ok()) return plan.status();
    out.plan = std::move(*plan);
  } else {
    out.plan = kvstore::uncompressed_plan(kind.policy, sizing.kv_model);
  }
  out.concurrency = cluster.settings.max_num_seqs;
  for (std::size_t i = 0; i < sizing.stages.size(); ++i) {
    const StageSizing& stage = sizing.stages[i];
    out.stages.push_back(use_of(sizing, kind, out.plan, stage));
    out.fitting.push_back(requests_that_fit(sizing.shape, stage.capacity, out.stages.back()));
    if (out.fitting.back() >= out.concurrency) continue;
    out.concurrency = out.fitting.back();
    out.limiting_stage = static_cast<int>(i);
  }
  return out;
}

std::vector<BoundaryUse> boundary_uses(const ClusterSizing& sizing, const RequestKind& kind,
                                       const kvstore::SequencePlan& plan) {
  std::vector<BoundaryUse> uses;
  for (std::int64_t generated = 0; generated <= last_boundary(kind);
       generated += kGeneratedBoundary) {
    BoundaryUse& use = uses.emplace_back();
    use.n_tokens = kind.prompt_tokens + generated;
    for (const StageSizing& stage : sizing.stages) {
      const auto expected = use_at(sizing, kind, plan, stage.predicted.layers, generated);
      use.bytes.push_back(expected.bytes);
      use.held_pages.push_back(expected.held_pages());
    }
  }
  return uses;
}

}  // namespace spindle::coordinator
