// Prefill attention: whole prompts, a chunk over a long prefix, short questions over long contexts.
// Only the products of visible pairs count. Arguments: `mma` also measures the kernel that devices
// other than 9.0 take.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>

#include "kernels/attention.h"
#include "kernels/bench/cuda/bench.h"
#include "kernels/cuda/prefill_kernels.h"

namespace spindle::bench {
namespace {

using kernels::AttentionShape;
using kernels::DeviceKvHead;
using kernels::DeviceSequence;
using kernels::kKvPageTokens;
using kernels::PrefillKernel;

struct Problem {
  AttentionShape shape;
  DType dtype = DType::kF16;
  int n_sequences = 1;
  int n_queries = 0;
  int n_context = 0;
  double bar = 0;
};

class PrefillBench {
 public:
  PrefillBench(const Bench& bench, PrefillKernel kernel) : bench_(bench), kernel_(kernel) {}

  void run(const Problem& problem) {
    const kernels::KvPageLayout layout{problem.shape.head_dim, kKvPageTokens, problem.dtype};
    const std::size_t n_heads = static_cast<std::size_t>(problem.n_sequences) *
                                static_cast<std::size_t>(problem.shape.n_kv_heads);
    const std::size_t pages_per_head =
        static_cast<std::size_t>((problem.n_context + kKvPageTokens - 1) / kKvPageTokens);
    const std::size_t pages_per_set = n_heads * pages_per_head;
    // Enough copies of the cache that none is in the level-2 cache when its turn comes.
    const std::size_t set_bytes = pages_per_set * layout.page_bytes();
    const std::size_t n_sets =
        std::clamp<std::size_t>((std::size_t{256} << 20) / set_bytes, 1, 8) + 1;
    const std::size_t n_pages = n_sets * pages_per_set;
    const DeviceBuffer pool = bench_.random(
        n_pages * layout.page_bytes(),
        problem.dtype == DType::kF16 ? Bench::Fill::kNormalF16 : Bench::Fill::kNormalBf16);
    std::vector<std::uint32_t> pages(n_pages);
    std::iota(pages.begin(), pages.end(), 0U);
    std::mt19937 random(7);
    std::shuffle(pages.begin(), pages.end(), random);
    const DeviceBuffer table = upload(pages);
    std::vector<DeviceKvHead> heads(n_sets * n_heads);
    for (std::size_t i = 0; i < heads.size(); ++i) {
      heads[i].pages = table.as<std::uint32_t>() + i * pages_per_head;
    }
    const DeviceBuffer device_heads = upload(heads);
    std::vector<DeviceSequence> sequences;
    for (std::size_t set = 0; set < n_sets; ++set) {
      for (int i = 0; i < problem.n_sequences; ++i) {
        DeviceSequence sequence;
        sequence.query_begin = i * problem.n_queries;
        sequence.n_queries = problem.n_queries;
        sequence.n_context = problem.n_context;
        sequence.heads = device_heads.as<DeviceKvHead>() + set * n_heads +
                         static_cast<std::size_t>(i * problem.shape.n_kv_heads);
        sequences.push_back(sequence);
      }
    }
    const DeviceBuffer device_sequences = upload(sequences);
    const std::int64_t n_rows = std::int64_t{problem.n_sequences} * problem.n_queries;
    const std::int64_t width = std::int64_t{problem.shape.n_heads} * problem.shape.head_dim;
    const std::size_t row_bytes = static_cast<std::size_t>(n_rows * width) * 2;
    const DeviceBuffer q = bench_.random(row_bytes, Bench::Fill::kNormalF16, 2);
    const DeviceBuffer out = bench_.allocate(row_bytes);
    const std::vector<std::int32_t> n_queries(static_cast<std::size_t>(problem.n_sequences),
                                              problem.n_queries);
    const float scale = problem.shape.head_dim == 128 ? 0.0883883F : 0.125F;

    const auto call = [&](int i) {
      const std::size_t set = static_cast<std::size_t>(i) % n_sets;
      kernels::attention_prefill_with(
          kernel_, bench_.context(), {q.as<F16>(), n_rows, width}, n_queries,
          device_sequences.as<DeviceSequence>() +
              set * static_cast<std::size_t>(problem.n_sequences),
          0, problem.shape, {pool.data(), layout}, scale, {}, {out.as<Bf16>(), n_rows, width});
    };
    Result result;
    result.name = "attention_prefill";
    result.median_us = bench_.median_us(call, 20, 5);
    const double before = problem.n_context - problem.n_queries;
    const double pairs = problem.n_queries * (before + 0.5 * problem.n_queries);
    result.flops = 4.0 * pairs * problem.n_sequences * static_cast<double>(width);
    result.bytes = static_cast<double>(set_bytes + 2 * row_bytes);
    // A short question is a pass over the cache: it is bound by the bytes it reads.
    const bool reads = problem.n_queries < 256;
    result.yardstick = reads ? "copy" : "gemm";
    result.bar = problem.bar;
    result.note =
        (kernel_ == PrefillKernel::kMma ? std::string("mma")
                                        : "wgmma" + std::to_string(static_cast<int>(kernel_) - 1)) +
        ", " + std::string(dtype_name(problem.dtype));
    result.parameters = {{"sequences", static_cast<double>(problem.n_sequences)},
                         {"queries", static_cast<double>(problem.n_queries)},
                         {"context", static_cast<double>(problem.n_context)},
                         {"heads", static_cast<double>(problem.shape.n_heads)},
                         {"kv_heads", static_cast<double>(problem.shape.n_kv_heads)},
                         {"head_dim", static_cast<double>(problem.shape.head_dim)}};
    bench_.report(result);
  }

 private:
  template <typename T>
  DeviceBuffer upload(const std::vector<T>& values) const {
    DeviceBuffer buffer = bench_.allocate(values.size() * sizeof(T));
    bench_.context().to_device(buffer.data(), values.data(), values.size() * sizeof(T));
    return buffer;
  }

  const Bench& bench_;
  PrefillKernel kernel_;
};

void run_all(const Bench& bench, PrefillKernel kernel) {
  constexpr AttentionShape kLlama8b{32, 8, 128};
  constexpr AttentionShape kSmallHeads{32, 8, 64};
  constexpr DType kF16 = DType::kF16;
  // PyTorch on the same card at 8k: flash attention 0.40, cuDNN 0.75 of the yardstick.
  const double bar = kernel == PrefillKernel::kWgmma ? 0.45 : 0;
  PrefillBench prefill(bench, kernel);
  // The longest last: the card slows down under minutes of products.
  prefill.run({kLlama8b, kF16, 1, 2048, 2048});
  prefill.run({kLlama8b, kF16, 1, 8192, 8192, bar});
  prefill.run({kLlama8b, DType::kBF16, 1, 8192, 8192, bar});
  prefill.run({kSmallHeads, kF16, 1, 8192, 8192});
  prefill.run({kLlama8b, kF16, 8, 512, 512});
  prefill.run({kLlama8b, kF16, 16, 1000, 1000});
  for (const int n : {8192, 32768}) {
    for (const int batch : {1, 4}) prefill.run({kLlama8b, kF16, batch, 20, n});
  }
  prefill.run({kLlama8b, kF16, 1, 128, 32768});
  prefill.run({kLlama8b, kF16, 64, 20, 2048});
  prefill.run({kLlama8b, kF16, 1, 2048, 2048 + 32768});
  prefill.run({kLlama8b, kF16, 1, 32768, 32768});
}

}  // namespace
}  // namespace spindle::bench

int main(int argc, char** argv) {
  using spindle::kernels::PrefillKernel;
  try {
    const spindle::bench::Bench bench;
    const PrefillKernel best = spindle::kernels::best_prefill_kernel(bench.context());
    spindle::bench::run_all(bench, best);
    if (best != PrefillKernel::kMma && argc > 1 && std::strcmp(argv[1], "mma") == 0) {
      spindle::bench::run_all(bench, PrefillKernel::kMma);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
