// What the store costs a GPU's steps, at the shape of Llama-3-8B (32 layers, 8 KV heads, d = 128):
// boundaries from the call to the last kernel's end, and page tables of a decode step. Host time
// counts: the stage's thread makes these calls between steps.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/bench/cuda/bench.h"
#include "kernels/rope.h"
#include "kvstore/device_memory.h"
#include "kvstore/kv_store.h"

namespace spindle::bench {
namespace {

using kernels::KvCodec;
using kernels::KvFormat;
using kvstore::HeadPlan;
using kvstore::KvMode;

constexpr int kDim = 128;
constexpr int kKvHeads = 8;
constexpr int kLayers = 32;
constexpr int kTables = kLayers * kKvHeads;
constexpr std::int64_t kTokens = 8192;
constexpr std::int64_t kMaxModelLen = 16384;
constexpr std::uint64_t kPoolBytes = std::uint64_t{16} << 30;
constexpr int kRuns = 9;

struct Case {
  std::string name;
  KvCodec codec;
  int keep_one_of = 1;  // EVICT: candidates that stay; 1: FULL
};

class KvStoreBench {
 public:
  KvStoreBench() {
    std::vector<float> frequencies;
    for (int i = 0; i < kDim; i += 2) {
      frequencies.push_back(std::pow(500000.0F, -static_cast<float>(i) / kDim));
    }
    const auto table = kernels::RopeTable::create(frequencies, kMaxModelLen);
    const std::size_t n = static_cast<std::size_t>(kMaxModelLen) * kDim / 2;
    cos_ = upload(table->cos(0), n);
    sin_ = upload(table->sin(0), n);
    kvstore::DeviceMemoryConfig config;
    config.store.shape = {kKvHeads, kDim, DType::kF16, 32};
    config.store.n_layers = kLayers;
    config.store.budget_bytes = kPoolBytes;
    config.max_model_len = kMaxModelLen;
    config.rope = {cos_.as<float>(), sin_.as<float>(), kMaxModelLen, kDim, 1.0F};
    auto memory = kvstore::DeviceMemory::create(bench_.context(), config);
    if (!memory.ok()) throw std::runtime_error(memory.status().to_string());
    const DeviceBuffer content = bench_.random(kPoolBytes, Bench::Fill::kNormalF16);
    bench_.context().copy((*memory)->base(), content.data(), kPoolBytes);
    bench_.context().synchronize();
    store_ = *kvstore::KvStore::create(config.store, *std::move(memory));
  }

  void run() {
    const KvCodec lloyd44{KvFormat::kLloyd4, KvFormat::kLloyd4};
    for (const Case& c : {Case{"int4", {KvFormat::kInt4, KvFormat::kInt4}}, Case{"lloyd4", lloyd44},
                          Case{"lloyd4_evict", lloyd44, 10}, Case{"raw_evict", {}, 4},
                          Case{"codebook", {KvFormat::kCodebook, KvFormat::kCodebook}}}) {
      boundaries(c);
    }
    for (const int n_sequences : {32, 128}) tables(n_sequences);
  }

 private:
  DeviceBuffer upload(const float* values, std::size_t n) const {
    DeviceBuffer buffer = bench_.allocate(n * sizeof(float));
    bench_.context().to_device(buffer.data(), values, n * sizeof(float));
    bench_.context().synchronize();
    return buffer;
  }
  static void require(const Status& status) {
    if (!status.ok()) throw std::runtime_error(status.to_string());
  }
  // Of the host's clock, until the device is done.
  double us(const std::function<void()>& work, double* host_us = nullptr) const {
    bench_.context().synchronize();
    const auto start = std::chrono::steady_clock::now();
    const auto since = [&] {
      return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
          .count();
    };
    work();
    if (host_us != nullptr) *host_us = since();
    bench_.context().synchronize();
    return since();
  }
  static double median(std::vector<double> values) {
    std::nth_element(values.begin(),
                     values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
    return values[values.size() / 2];
  }
  void open(kvstore::SequenceId id, std::int64_t n_tokens) {
    const std::int64_t max_tokens = n_tokens + 512;
    require(store_->open(id, max_tokens,
                         kvstore::stage_pages(store_->shape(), kLayers, max_tokens) + 2 * kTables));
    require(store_->extend(id, std::vector<std::int32_t>(static_cast<std::size_t>(n_tokens))));
    store_->flush_tables();
  }

  // The end of a prompt of 8k tokens, then one of 64 generated tokens.
  void boundaries(const Case& c) {
    std::vector<HeadPlan> plans(kTables, {.codec = c.codec});
    std::vector<std::vector<std::int32_t>> kept;
    if (c.keep_one_of > 1) {
      for (HeadPlan& plan : plans) plan.mode = KvMode::kEvict;
      kept.resize(kTables);
      for (auto& positions : kept) {
        for (std::int32_t p = 0; p < kTokens; p += c.keep_one_of) positions.push_back(p);
      }
    }
    kvstore::StageBoundary boundary;
    boundary.sinks = 4;
    boundary.recent = 64;
    boundary.heads = plans;
    std::vector<double> prompt;
    std::vector<double> prompt_host;
    std::vector<double> generated;
    double kept_bytes = 0;
    for (int i = 0; i < kRuns; ++i) {
      open(1, kTokens);
      boundary.kept = kept;
      const auto compress = [&] {
        const auto result = store_->compress(1, boundary);
        require(result.status());
        store_->flush_tables();
      };
      double host_us = 0;
      prompt.push_back(us(compress, &host_us));
      prompt_host.push_back(host_us);
      kept_bytes = static_cast<double>(store_->stats().used_bytes);
      boundary.kept = {};
      require(store_->extend(1, std::vector<std::int32_t>(64)));
      store_->flush_tables();
      generated.push_back(us(compress));
      require(store_->free(1).status());
    }
    Result result;
    result.name = "kv_boundary_" + c.name;
    result.parameters = {{"tokens", static_cast<double>(kTokens)},
                         {"layers", kLayers},
                         {"host_us", median(prompt_host)},
                         {"generated_boundary_us", median(generated)}};
    result.median_us = median(prompt);
    // What stays is read from pages of 16 bits and written in the codec.
    result.bytes = static_cast<double>(kTokens) / c.keep_one_of * kTables * kDim * 4 + kept_bytes;
    result.yardstick = "copy";
    bench_.report(result);
  }

  // A decode step: every sequence takes a token, one in 32 of them pages.
  void tables(int n_sequences) {
    const std::vector<std::int32_t> token(1);
    for (int s = 0; s < n_sequences; ++s) open(static_cast<kvstore::SequenceId>(s), 64 + s % 32);
    std::vector<double> steps;
    for (int i = 0; i < 256; ++i) {
      steps.push_back(us([&] {
        for (int s = 0; s < n_sequences; ++s) {
          require(store_->extend(static_cast<kvstore::SequenceId>(s), token));
        }
        store_->flush_tables();
      }));
    }
    for (int s = 0; s < n_sequences; ++s) {
      require(store_->free(static_cast<kvstore::SequenceId>(s)).status());
    }
    Result result;
    result.name = "kv_tables_of_a_decode_step";
    result.parameters = {{"sequences", static_cast<double>(n_sequences)}, {"layers", kLayers}};
    result.median_us = median(steps);
    bench_.report(result);
  }

  Bench bench_;
  DeviceBuffer cos_;
  DeviceBuffer sin_;
  std::unique_ptr<kvstore::KvStore> store_;
};

}  // namespace
}  // namespace spindle::bench

int main() {
  try {
    spindle::bench::KvStoreBench().run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
