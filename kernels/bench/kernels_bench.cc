// Kernel rates as shares of yardsticks taken in the same run: read bandwidth for what streams
// memory, oneDNN's f32 product for what multiplies. Single-threaded, best of several rounds, so
// that a neighbour on the machine costs rounds and not the result.
//
// kernels_bench [linear|attention|kv_attention|all] [portable|avx2|avx512]

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels/attention.h"
#include "kernels/bench/kv_attention_bench.h"
#include "kernels/bench/yardsticks.h"
#include "kernels/core/cpu_context.h"
#include "kernels/linear.h"

namespace spindle::kernels {
namespace {

struct Matrix {
  std::int64_t n_in;
  std::int64_t n_out;
};

void bench_linear(const CpuContext& context) {
  std::printf("linear, bf16 weights, fp32 math, one thread\n");
  std::printf("%6s %6s %5s %10s %10s %8s %10s %8s\n", "n_in", "n_out", "M", "GFLOP/s", "oneDNN f32",
              "ratio", "weight GB/s", "of read");
  for (const Matrix& shape : {Matrix{256, 1536}, Matrix{2048, 8192}, Matrix{4096, 4096}}) {
    const auto elements = static_cast<std::size_t>(shape.n_in * shape.n_out);
    const double read = read_bandwidth(elements * 2);
    const std::vector<std::uint16_t> weight(elements, 0x3e80);
    const std::vector<WeightSource> sources = {{weight.data(), DType::kBF16, shape.n_out}};
    const PackedLinear packed = PackedLinear::pack(context, sources, shape.n_in).value();
    for (const std::int64_t m : {1, 2, 4, 8, 16, 32, 64, 512}) {
      std::vector<float> x(static_cast<std::size_t>(m * shape.n_in), 0.5F);
      std::vector<float> y(static_cast<std::size_t>(m * shape.n_out));
      const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(elements);
      const double ours = best_seconds([&] {
        linear(context, packed, {x.data(), m, shape.n_in}, {y.data(), m, shape.n_out});
      });
      const auto library = onednn_f32_product(m, shape.n_out, shape.n_in);
      const double theirs = library ? best_seconds(library) : 0.0;
      const double rate = static_cast<double>(elements) * 2.0 / ours * 1e-9;
      std::printf("%6ld %6ld %5ld %10.1f %10.1f %8.2f %10.1f %8.2f\n", shape.n_in, shape.n_out, m,
                  flops / ours * 1e-9, library ? flops / theirs * 1e-9 : 0.0,
                  library ? theirs / ours : 0.0, rate, rate / read);
    }
  }
}

struct Cache {
  std::vector<std::byte> storage;
  std::vector<const std::byte*> pages;
  std::vector<KvHeadPages> heads;

  Cache(const KvPageLayout& layout, int n_kv_heads, std::int64_t n_context) {
    const std::int64_t per_head = (n_context + layout.page_tokens - 1) / layout.page_tokens;
    const auto n_pages = static_cast<std::size_t>(per_head * n_kv_heads);
    storage.resize(n_pages * layout.page_bytes() + 64);
    // 0x3c3c is a small positive number in f16 and in bf16.
    std::memset(storage.data(), 0x3c, storage.size());
    const auto skip = (64 - reinterpret_cast<std::uintptr_t>(storage.data()) % 64) % 64;
    for (std::size_t i = 0; i < n_pages; ++i) {
      pages.push_back(storage.data() + skip + i * layout.page_bytes());
    }
    for (int head = 0; head < n_kv_heads; ++head) heads.push_back({pages.data() + head * per_head});
  }
};

void bench_attention(const CpuContext& context) {
  const auto library = onednn_f32_product(512, 2048, 2048);
  const double gemm = library ? 2.0 * 512 * 2048 * 2048 / best_seconds(library) * 1e-9 : 0.0;
  std::printf("attention, one thread; oneDNN f32 product %.1f GFLOP/s\n", gemm);
  std::printf("%4s %6s %5s %8s %6s %10s %8s %10s %8s\n", "type", "d", "group", "context", "query",
              "GFLOP/s", "of gemm", "KV GB/s", "of read");
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int head_dim : {64, 128}) {
      for (const int group : {1, 4}) {
        for (const std::int64_t n_context : {1024, 8192}) {
          const KvPageLayout layout{head_dim, kKvPageTokens, dtype};
          const AttentionShape shape{2 * group, 2, head_dim};
          const Cache cache(layout, 2, n_context);
          const double read = read_bandwidth(cache.storage.size());
          for (const std::int64_t n_queries : {std::int64_t{1}, n_context / 4}) {
            const std::int64_t width = std::int64_t{shape.n_heads} * head_dim;
            std::vector<float> q(static_cast<std::size_t>(n_queries * width), 0.1F);
            std::vector<float> out(q.size());
            const std::vector<AttentionSequence> sequences = {
                {0, n_queries, n_context, cache.heads.data()}};
            const double seconds = best_seconds([&] {
              attention(context, {q.data(), n_queries, width}, sequences, shape, layout, 0.1F,
                        {out.data(), n_queries, width});
            });
            const double seen =
                static_cast<double>(n_queries) * static_cast<double>(n_context) -
                0.5 * static_cast<double>(n_queries) * static_cast<double>(n_queries - 1);
            const double rate = 4.0 * seen * static_cast<double>(width) / seconds * 1e-9;
            const double bytes = static_cast<double>(cache.storage.size()) / seconds * 1e-9;
            std::printf("%4s %6d %5d %8ld %6ld %10.1f %8.2f %10.1f %8.2f\n",
                        std::string(dtype_name(dtype)).c_str(), head_dim, group, n_context,
                        n_queries, rate, gemm > 0 ? rate / gemm : 0.0, bytes, bytes / read);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace spindle::kernels

int main(int argc, char** argv) {
  using namespace spindle;
  const std::string_view what = argc > 1 ? argv[1] : "all";
  CpuOptions options;
  for (const CpuIsa isa : supported_cpu_isas()) {
    if (argc > 2 && cpu_isa_name(isa) == argv[2]) options.isa = isa;
  }
  const auto context = std::move(CpuContext::create(options)).value();
  std::printf(
      "instruction set %s; read bandwidth of one thread: 1 MiB %.1f GB/s, 512 MiB %.1f GB/s\n",
      std::string(cpu_isa_name(context->isa())).c_str(),
      kernels::read_bandwidth(std::size_t{1} << 20),
      kernels::read_bandwidth(std::size_t{512} << 20));
  if (what == "linear" || what == "all") kernels::bench_linear(*context);
  if (what == "attention" || what == "all") kernels::bench_attention(*context);
  if (what == "kv_attention" || what == "all") kernels::bench_kv_attention(*context);
  return 0;
}
