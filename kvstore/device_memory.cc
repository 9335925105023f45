#include "kvstore/device_memory.h"

#include <algorithm>
#include <string>
#include <utility>

#include "kernels/attention.h"
#include "kernels/cuda/kv_device.h"
#include "kernels/kv_compact.h"
#include "kvstore/plan/device_layout.h"

namespace spindle::kvstore {
namespace {

constexpr std::size_t kCopiesPerLaunch = 16384;
static_assert(kernels::kNoPlace >= kMostDevicePoolBytes / kernels::kKvPlaceBytes - 1,
              "places reach the largest pool");

std::uint64_t pool_bytes(const KvStoreConfig& config) {
  const std::uint64_t page_bytes = config.shape.page_bytes();
  return config.budget_bytes / page_bytes * page_bytes;
}

DeviceEncoderConfig encoder_config(const DeviceMemoryConfig& config) {
  DeviceEncoderConfig encoder;
  encoder.shape = config.store.shape;
  encoder.n_pages =
      static_cast<std::int64_t>(config.store.budget_bytes / config.store.shape.page_bytes());
  encoder.max_model_len = config.max_model_len;
  encoder.rope = config.rope;
  encoder.wide_positions = config.store.wide_positions;
  encoder.wide_ids = config.store.wide_ids;
  return encoder;
}

}  // namespace

std::uint64_t DeviceMemory::scratch_bytes(const DeviceMemoryConfig& config) {
  return DeviceEncoder::device_bytes(encoder_config(config)) + DeviceTables::fixed_bytes() +
         DeviceStaging::bytes_of<kernels::DeviceCopy>(kCopiesPerLaunch);
}

Result<std::unique_ptr<DeviceMemory>> DeviceMemory::create(const CudaContext& context,
                                                           const DeviceMemoryConfig& config) {
  const KvShape& shape = config.store.shape;
  if (Status status = check_device_layout(shape); !status.ok()) return status;
  if (shape.page_tokens != kernels::kKvPageTokens) {
    return unimplemented("KV on a CUDA device is in pages of " +
                         std::to_string(kernels::kKvPageTokens) + " tokens, not " +
                         std::to_string(shape.page_tokens));
  }
  if (pool_bytes(config.store) == 0) {
    return invalid_argument("a KV budget of " + std::to_string(config.store.budget_bytes) +
                            " bytes holds no page of " + std::to_string(shape.page_bytes()) +
                            " bytes");
  }
  if (pool_bytes(config.store) / kernels::kKvPlaceBytes >= kernels::kNoPlace) {
    return invalid_argument("a KV pool of " + std::to_string(config.store.budget_bytes) +
                            " bytes; places reach 256 GiB");
  }
  auto pool = context.allocate(pool_bytes(config.store), "the KV pool");
  if (!pool.ok()) return pool.status();
  std::unique_ptr<DeviceMemory> memory(new DeviceMemory(context, config, std::move(*pool)));
  auto tables = DeviceTables::create(context, memory->base(), shape.page_tokens);
  if (!tables.ok()) return tables.status();
  memory->tables_ = std::move(*tables);
  auto encoder = DeviceEncoder::create(context, memory->base(), encoder_config(config));
  if (!encoder.ok()) return encoder.status();
  memory->encoder_ = std::move(*encoder);
  auto staging = DeviceStaging::create(
      context, DeviceStaging::bytes_of<kernels::DeviceCopy>(kCopiesPerLaunch), "copies of KV");
  if (!staging.ok()) return staging.status();
  memory->copy_staging_ = std::move(*staging);
  return memory;
}

DeviceMemory::DeviceMemory(const CudaContext& context, const DeviceMemoryConfig& config,
                           DeviceBuffer pool)
    : context_(context), config_(config), pool_(std::move(pool)) {
  set_memory(pool_.data(), pool_.n_bytes());
}

void DeviceMemory::copy(std::span<const KvCopy> copies) {
  while (!copies.empty()) {
    const std::size_t n = std::min(copies.size(), kCopiesPerLaunch);
    copy_staging_->begin();
    const auto staged = copy_staging_->add<kernels::DeviceCopy>(n);
    std::transform(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(n), staged.host,
                   [](const KvCopy& copy) {
                     return kernels::DeviceCopy{copy.source, copy.target, copy.n_bytes};
                   });
    copy_staging_->send();
    kernels::kv_copy(context_, staged.device, staged.n);
    copies = copies.subspan(n);
  }
}

Status DeviceMemory::open_tables(SequenceId sequence, std::span<const HeadCache> caches,
                                 std::int64_t max_tokens, std::span<const TableRoom> room) {
  if (max_tokens > config_.max_model_len) {
    return invalid_argument("a sequence of up to " + std::to_string(max_tokens) +
                            " tokens, this model's are of at most " +
                            std::to_string(config_.max_model_len));
  }
  return tables_->open(sequence, caches, max_tokens, room);
}

}  // namespace spindle::kvstore
