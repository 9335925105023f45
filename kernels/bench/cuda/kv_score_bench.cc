// One boundary of an 8B model's layer: probabilities, value norms, defensive scores, selection.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <vector>

#include "kernels/bench/cuda/bench.h"
#include "kernels/cuda/value_norms.h"
#include "kernels/kv_score.h"
#include "kernels/kv_select.h"

namespace spindle::bench {
namespace {

constexpr kernels::AttentionShape kShape{32, 8, 128};
constexpr std::int64_t kHidden = 4096;
constexpr int kLayers = 32;
constexpr int kWindow = 32;

// Two layers' data in turn: at these sizes one does not fit the L2 cache.
constexpr int kSets = 2;

struct LayerData {
  DeviceBuffer pool;
  DeviceBuffer q;
  DeviceBuffer output;
  DeviceBuffer p;
  DeviceBuffer norms;
  DeviceBuffer scores;
  DeviceBuffer means;
  DeviceBuffer pages;
  DeviceBuffer heads;
  DeviceBuffer sequence;
};

class Boundary {
 public:
  Boundary(const Bench& bench, std::int64_t n_tokens) : bench_(bench), n_tokens_(n_tokens) {
    const CudaContext& context = bench.context();
    const auto n_kv = static_cast<std::size_t>(kShape.n_kv_heads);
    n_slots_.assign(n_kv, n_tokens);
    tail_first_.assign(n_kv, 0);
    stride_ = kernels::score_stride(n_slots_);
    const kernels::KvPageLayout layout{kShape.head_dim, kernels::kKvPageTokens, DType::kF16};
    const auto n_pages = static_cast<std::size_t>((n_tokens + 31) / 32);
    const std::size_t width = std::size_t{32} * 128;
    std::vector<std::uint32_t> numbers(n_kv * n_pages);
    // Neighbours in the sequence are not neighbours in the pool.
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = static_cast<std::uint32_t>(i * 2654435761ULL % numbers.size());
    }
    for (int set = 0; set < kSets; ++set) {
      LayerData data;
      const auto seed = static_cast<std::uint64_t>(10 * set + 1);
      data.pool = bench.random(numbers.size() * layout.page_bytes(), Bench::Fill::kNormalF16, seed);
      data.q = bench.random(kWindow * width * 2, Bench::Fill::kNormalF16, seed + 1);
      data.output = bench.random(static_cast<std::size_t>(kHidden) * width * 2,
                                 Bench::Fill::kNormalBf16, seed + 2);
      data.p = bench.allocate(std::size_t{32} * kWindow * static_cast<std::size_t>(stride_) * 4);
      data.norms = bench.allocate(n_kv * static_cast<std::size_t>(stride_) * 4);
      data.scores = bench.allocate(n_kv * static_cast<std::size_t>(stride_) * 4);
      data.means = bench.allocate(n_kv * static_cast<std::size_t>(stride_) * 4);
      data.pages = bench.allocate(numbers.size() * 4);
      context.to_device(data.pages.data(), numbers.data(), numbers.size() * 4);
      std::vector<kernels::DeviceKvHead> heads(n_kv);
      for (std::size_t h = 0; h < n_kv; ++h) {
        heads[h].pages = data.pages.as<std::uint32_t>() + h * n_pages;
      }
      data.heads = bench.allocate(heads.size() * sizeof(heads[0]));
      context.to_device(data.heads.data(), heads.data(), heads.size() * sizeof(heads[0]));
      kernels::DeviceSequence sequence;
      sequence.n_context = static_cast<std::int32_t>(n_tokens);
      sequence.heads = data.heads.as<kernels::DeviceKvHead>();
      data.sequence = bench.allocate(sizeof(sequence));
      context.to_device(data.sequence.data(), &sequence, sizeof(sequence));
      context.synchronize();
      sets_.push_back(std::move(data));
    }
    workspace_bytes_ = std::max({kernels::window_probabilities_workspace_bytes(kShape, kWindow),
                                 kernels::value_output_norms_workspace_bytes(kShape, kHidden),
                                 kernels::defensive_workspace_bytes(kShape, kWindow)});
    workspace_ = bench.allocate(workspace_bytes_);
    // Selection takes the rows of all layers in one launch; they share the measured scores.
    const std::size_t n_rows = kLayers * n_kv;
    kept_ = bench.allocate(n_rows * static_cast<std::size_t>(n_tokens / 4) * 4);
    std::vector<kernels::DeviceSelect> rows(n_rows);
    for (std::size_t r = 0; r < n_rows; ++r) {
      rows[r].scores =
          sets_[r / n_kv % kSets].scores.as<float>() + r % n_kv * static_cast<std::size_t>(stride_);
      rows[r].n = static_cast<std::int32_t>(n_tokens - kWindow);
      rows[r].k = static_cast<std::int32_t>(n_tokens / 4);
      rows[r].kept = kept_.as<std::int32_t>() + r * static_cast<std::size_t>(n_tokens / 4);
    }
    rows_ = bench.allocate(n_rows * sizeof(rows[0]));
    context.to_device(rows_.data(), rows.data(), n_rows * sizeof(rows[0]));
    totals_ = bench.allocate((32 * kWindow + 64) * sizeof(float));
    std::vector<kernels::DeviceBoostHead> heads(n_rows);
    for (std::size_t r = 0; r < n_rows; ++r) {
      const LayerData& data = sets_[r / n_kv % kSets];
      const std::size_t at = r % n_kv * static_cast<std::size_t>(stride_);
      heads[r] = {data.scores.as<float>() + at,
                  data.means.as<float>() + at,
                  totals_.as<float>(),
                  totals_.as<float>() + 32 * kWindow,
                  static_cast<std::int32_t>(n_tokens - kWindow),
                  32 * kWindow};
    }
    boost_ = bench.allocate(n_rows * sizeof(heads[0]));
    context.to_device(boost_.data(), heads.data(), n_rows * sizeof(heads[0]));
    capacity_ = static_cast<std::int64_t>(n_rows) * 4096;
    entries_ = bench.allocate(static_cast<std::size_t>(capacity_) * 8 + 8 * n_rows + 256);
    context.synchronize();
  }

  void run() {
    const auto n = static_cast<double>(n_tokens_);
    const double row_bytes = 32.0 * kWindow * n * 4;
    const double key_bytes = 8.0 * n * 128 * 2;
    const double probabilities = measure(
        "score_probabilities", [&](int i) { this->probabilities(i); }, key_bytes + row_bytes,
        2.0 * 32 * kWindow * n * 128, "copy");
    const double norms = measure(
        "score_value_norms", [&](int i) { this->norms(i, kernels::ValueNormsPath::kBest); },
        key_bytes + 2.0 * kHidden * 4096, 2.0 * 4096 * kHidden * n, "gemm");
    measure(
        "score_value_norms_mma", [&](int i) { this->norms(i, kernels::ValueNormsPath::kMma); },
        key_bytes + 2.0 * kHidden * 4096, 2.0 * 4096 * kHidden * n, "gemm");
    const double defensive = measure(
        "score_defensive", [&](int i) { this->defensive(i); }, 2 * key_bytes + 8.0 * n * 8,
        4.0 * 32 * kWindow * n * 128, "copy");
    const double boost = measure(
        "score_boost",
        [&](int) {
          kernels::defensive_boost(bench_.context(), boost_.as<kernels::DeviceBoostHead>(),
                                   kLayers * 8, n_tokens_ / 4);
        },
        kLayers * 8.0 * n * 4 * 1.5, 0, "copy", "all layers in one launch");
    const double select = measure(
        "select_top_k",
        [&](int) {
          kernels::select_top_k(bench_.context(), rows_.as<kernels::DeviceSelect>(), kLayers * 8);
        },
        kLayers * 8.0 * n * 4 * 1.25, 0, "copy", "all layers in one launch");
    const double histogram = measure(
        "score_histogram", [&](int) { this->histogram(); }, kLayers * 8.0 * n * 4, 0, "copy",
        "all layers in one launch");
    Result whole;
    whole.name = "score_boundary";
    whole.parameters = {{"n_tokens", n},
                        {"probabilities_us_per_layer_not_in_the_sum", probabilities},
                        {"norms_us_per_layer", norms},
                        {"defensive_us_per_layer", defensive},
                        {"select_us_per_layer", (boost + select + histogram) / kLayers}};
    whole.median_us = kLayers * (norms + defensive) + boost + select + histogram;
    whole.flops = kLayers * 2.0 * 4096 * kHidden * n;
    whole.yardstick = "gemm";
    char note[96];
    std::snprintf(note, sizeof(note), "sum of the above for 32 layers: %.3f ms per 1k tokens",
                  whole.median_us / n);
    whole.note = note;
    bench_.report(whole);
  }

 private:
  kernels::DeviceScoreLayer layer(int i) const {
    const LayerData& data = sets_[static_cast<std::size_t>(i % kSets)];
    kernels::DeviceScoreLayer layer;
    layer.sequence = data.sequence.as<kernels::DeviceSequence>();
    layer.shape = kShape;
    layer.pool = {data.pool.data(), {kShape.head_dim, kernels::kKvPageTokens, DType::kF16}};
    layer.n_tokens = n_tokens_;
    layer.n_queries = kWindow;
    layer.q = data.q.as<F16>();
    layer.n_slots = n_slots_;
    layer.tail_first = tail_first_;
    return layer;
  }
  Rows rows_of(const DeviceBuffer& buffer, std::int64_t n_rows) const {
    return {buffer.as<float>(), n_rows, stride_};
  }
  void probabilities(int i) {
    kernels::window_probabilities(
        bench_.context(), layer(i), 0.08838835F, workspace_.data(), workspace_bytes_,
        rows_of(sets_[static_cast<std::size_t>(i % kSets)].p, 32 * kWindow));
  }
  void norms(int i, kernels::ValueNormsPath path) {
    const LayerData& data = sets_[static_cast<std::size_t>(i % kSets)];
    kernels::value_output_norms(bench_.context(), layer(i), data.output.as<Bf16>(), kHidden, 0,
                                workspace_.data(), workspace_bytes_, path, rows_of(data.norms, 8));
  }
  void defensive(int i) {
    const LayerData& data = sets_[static_cast<std::size_t>(i % kSets)];
    float* totals = totals_.as<float>();
    kernels::defensive_scores(
        bench_.context(), layer(i), 0.08838835F, rows_of(data.norms, 8), 0, workspace_.data(),
        workspace_bytes_,
        {rows_of(data.scores, 8), rows_of(data.means, 8), totals, totals + 32 * kWindow});
  }
  void histogram() {
    const std::size_t n_rows = kLayers * 8;
    auto* numbers = reinterpret_cast<std::uint32_t*>(entries_.data() + capacity_ * 8);
    kernels::score_histogram(bench_.context(), rows_.as<kernels::DeviceSelect>(),
                             static_cast<int>(n_rows),
                             {entries_.as<kernels::DeviceHistogramEntry>(), capacity_, numbers,
                              numbers + n_rows, numbers + 2 * n_rows});
  }

  template <typename Run>
  double measure(const char* name, Run run, double bytes, double flops, const char* yardstick,
                 const char* note = "") {
    Result result;
    result.name = name;
    result.parameters = {{"n_tokens", static_cast<double>(n_tokens_)}};
    result.median_us = bench_.median_us(run);
    result.bytes = bytes;
    result.flops = flops;
    result.yardstick = yardstick;
    result.note = note;
    bench_.report(result);
    return result.median_us;
  }

  const Bench& bench_;
  std::int64_t n_tokens_;
  std::int64_t stride_ = 0;
  std::vector<std::int64_t> n_slots_;
  std::vector<std::int64_t> tail_first_;
  std::vector<LayerData> sets_;
  DeviceBuffer workspace_;
  std::size_t workspace_bytes_ = 0;
  DeviceBuffer totals_;
  DeviceBuffer boost_;
  DeviceBuffer kept_;
  DeviceBuffer rows_;
  DeviceBuffer entries_;
  std::int64_t capacity_ = 0;
};

}  // namespace
}  // namespace spindle::bench

int main() {
  try {
    const spindle::bench::Bench bench;
    for (const std::int64_t n_tokens : {2048, 8192, 32768}) {
      spindle::bench::Boundary(bench, n_tokens).run();
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
