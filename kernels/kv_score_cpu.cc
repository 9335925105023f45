#include "kernels/kv_score.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/core/check.h"
#include "kernels/isa/dispatch.h"

namespace spindle::kernels {
namespace {

// Values worth a second thread, about 10 us of the cheapest pass.
constexpr std::int64_t kMinValuesPerThread = 1 << 15;
// Columns that are taken through all rows at once: their accumulators stay in the L1 cache.
constexpr std::int64_t kColumnBlock = 1024;
// Keys whose mean is summed apart. Fixed, so that the sum does not depend on the threads.
constexpr std::int64_t kKeyBlock = 512;
constexpr std::int64_t kProjectedFloats = 1 << 18;  // 1 MiB

std::int64_t size_of(std::span<const float> values) {
  return static_cast<std::int64_t>(values.size());
}

// Calls fn(begin, end) on blocks of columns.
template <typename Fn>
void for_column_blocks(const CpuContext& context, std::int64_t n_rows, std::int64_t n_columns,
                       Fn fn) {
  const std::int64_t n_blocks = (n_columns + kColumnBlock - 1) / kColumnBlock;
  const std::int64_t grain = kMinValuesPerThread / (n_rows * kColumnBlock) + 1;
  context.parallel_for(n_blocks, grain, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t block = first; block < last; ++block) {
      fn(block * kColumnBlock, std::min((block + 1) * kColumnBlock, n_columns));
    }
  });
}

// Means over the rows of columns [begin, end), at most kColumnBlock of them.
void column_means(const KernelTable& kernels, ConstRows p, std::int64_t begin, std::int64_t end,
                  float* mean) {
  std::array<double, kColumnBlock> sums;
  std::fill_n(sums.begin(), end - begin, 0.0);
  for (std::int64_t i = 0; i < p.n_rows; ++i) {
    kernels.add_scaled(p.row(i) + begin, 1.0, end - begin, sums.data());
  }
  const double divisor = static_cast<double>(p.n_rows);
  for (std::int64_t t = begin; t < end; ++t) {
    mean[t] = static_cast<float>(sums[static_cast<std::size_t>(t - begin)] / divisor);
  }
}

double sum_between(const float* row, std::int64_t begin, std::int64_t end) {
  double sum = 0.0;
  for (std::int64_t t = begin; t < end; ++t) sum += static_cast<double>(row[t]);
  return sum;
}

}  // namespace

void window_softmax(const CpuContext& context, Rows logits) {
  const std::int64_t w = logits.n_rows;
  const std::int64_t n = logits.width;
  CHECK(w <= n, "more window rows than columns");
  if (w == 0) return;
  const KernelTable& kernels = kernels_for(context);
  context.parallel_for(
      w, kMinValuesPerThread / n + 1, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t j = begin; j < end; ++j) {
          float* row = logits.row(j);
          const std::int64_t seen = n - w + j + 1;
          kernels.exp_shifted(row, seen, kernels.max(row, seen), 1.0F, row);
          kernels.scale(static_cast<float>(1.0 / kernels.sum(row, seen)), seen, row);
          std::fill(row + seen, row + n, 0.0F);
        }
      });
}

void window_mean(const CpuContext& context, ConstRows p, std::span<float> mean) {
  CHECK(p.n_rows > 0 && p.width == size_of(mean), "window_mean shapes");
  const KernelTable& kernels = kernels_for(context);
  for_column_blocks(context, p.n_rows, p.width, [&](std::int64_t begin, std::int64_t end) {
    column_means(kernels, p, begin, end, mean.data());
  });
}

void window_max(const CpuContext& context, ConstRows p, std::span<float> max) {
  CHECK(p.n_rows > 0 && p.width == size_of(max), "window_max shapes");
  const KernelTable& kernels = kernels_for(context);
  for_column_blocks(context, p.n_rows, p.width, [&](std::int64_t begin, std::int64_t end) {
    std::fill(max.begin() + begin, max.begin() + end, 0.0F);
    for (std::int64_t i = 0; i < p.n_rows; ++i) {
      kernels.max_into(p.row(i) + begin, end - begin, max.data() + begin);
    }
  });
}

float lazy_mass_decode(ConstRows p, int n_sinks, std::int64_t window) {
  CHECK(p.n_rows > 0 && n_sinks >= 0 && window >= 0, "lazy_mass_decode arguments");
  const float* row = p.row(p.n_rows - 1);
  const std::int64_t sinks = std::min<std::int64_t>(n_sinks, p.width);
  const std::int64_t recent = std::max(p.width - std::min(window, p.width), sinks);
  return static_cast<float>(sum_between(row, 0, sinks) + sum_between(row, recent, p.width));
}

float lazy_mass_prefill(ConstRows p, int n_sinks, std::int64_t window) {
  CHECK(p.n_rows > 0 && p.n_rows <= p.width && n_sinks >= 0 && window >= 0,
        "lazy_mass_prefill arguments");
  const std::int64_t sinks = std::min<std::int64_t>(n_sinks, p.width);
  double total = 0.0;
  for (std::int64_t j = 0; j < p.n_rows; ++j) {
    const std::int64_t self = p.width - p.n_rows + j;
    const std::int64_t recent = std::max(self - std::min(window, self), sinks);
    total += sum_between(p.row(j), 0, sinks) + sum_between(p.row(j), recent, self);
  }
  return static_cast<float>(total / static_cast<double>(p.n_rows));
}

void snapkv_scores(ConstRows means, int window, GroupReduce reduce, std::span<float> scores) {
  const std::int64_t n = means.width - window;
  CHECK(means.n_rows > 0 && window >= 0 && n >= 0 && n == size_of(scores), "snapkv_scores shapes");
  for (std::int64_t t = 0; t < n; ++t) {
    const std::int64_t begin = std::max<std::int64_t>(t - 2, 0);
    const std::int64_t end = std::min(t + 3, n);
    double sum = 0.0;
    double best = 0.0;
    for (std::int64_t h = 0; h < means.n_rows; ++h) {
      const double pooled = sum_between(means.row(h), begin, end) / 5.0;
      sum += pooled;
      best = std::max(best, pooled);
    }
    const double mean = sum / static_cast<double>(means.n_rows);
    scores[static_cast<std::size_t>(t)] =
        static_cast<float>(reduce == GroupReduce::kMean ? mean : best);
  }
}

void keydiff_scores(const CpuContext& context, ConstRows keys, std::span<float> scores) {
  CHECK(keys.n_rows == size_of(scores) && keys.width > 0, "keydiff_scores shapes");
  const KernelTable& kernels = kernels_for(context);
  const auto dim = static_cast<std::size_t>(keys.width);
  const std::int64_t n_blocks = (keys.n_rows + kKeyBlock - 1) / kKeyBlock;
  const std::int64_t grain = kMinValuesPerThread / (kKeyBlock * keys.width) + 1;
  const auto inverse_norm = [&](const float* key) {
    const float square = kernels.dot(key, key, keys.width);
    return square > 0.0F && std::isfinite(square) ? 1.0 / std::sqrt(static_cast<double>(square))
                                                  : 0.0;
  };
  std::vector<double> sums(static_cast<std::size_t>(n_blocks) * dim, 0.0);
  context.parallel_for(n_blocks, grain, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first * kKeyBlock; t < std::min(last * kKeyBlock, keys.n_rows); ++t) {
      const double scale = inverse_norm(keys.row(t));
      if (scale == 0.0) continue;
      kernels.add_scaled(keys.row(t), scale, keys.width,
                         sums.data() + static_cast<std::size_t>(t / kKeyBlock) * dim);
    }
  });
  // Only the direction counts: the sum, of length 1.
  std::vector<double> sum(dim, 0.0);
  for (std::size_t i = 0; i < sums.size(); ++i) sum[i % dim] += sums[i];
  double square = 0.0;
  for (const double value : sum) square += value * value;
  const double scale = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
  std::vector<float> direction(dim);
  std::transform(sum.begin(), sum.end(), direction.begin(),
                 [scale](double value) { return static_cast<float>(value * scale); });
  context.parallel_for(n_blocks, grain, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first * kKeyBlock; t < std::min(last * kKeyBlock, keys.n_rows); ++t) {
      const double along = kernels.dot(keys.row(t), direction.data(), keys.width);
      scores[static_cast<std::size_t>(t)] = static_cast<float>(-along * inverse_norm(keys.row(t)));
    }
  });
}

void value_output_norms(const CpuContext& context, const PackedLinear& output, ConstRows v,
                        int n_heads, int n_kv_heads, Rows norms) {
  CHECK(n_kv_heads > 0 && n_heads > 0 && n_heads % n_kv_heads == 0 && v.width % n_kv_heads == 0,
        "value_output_norms heads");
  const std::int64_t dim = v.width / n_kv_heads;
  const int group = n_heads / n_kv_heads;
  const std::int64_t hidden = output.n_out();
  CHECK(output.n_in() == n_heads * dim && norms.n_rows == n_kv_heads && norms.width == v.n_rows,
        "value_output_norms shapes");
  const KernelTable& kernels = kernels_for(context);
  const std::int64_t block =
      std::min(std::max<std::int64_t>(kProjectedFloats / hidden, 1), v.n_rows);
  std::vector<float> projected(static_cast<std::size_t>(block * hidden));
  for (int h = 0; h < n_heads; ++h) {
    const int kv_head = h / group;
    float* norm = norms.row(kv_head);
    for (std::int64_t first = 0; first < v.n_rows; first += block) {
      const std::int64_t n = std::min(block, v.n_rows - first);
      const Rows y(projected.data(), n, hidden);
      linear_slice(context, output, h * dim, v.rows(first, n).columns(kv_head * dim, dim), y);
      context.parallel_for(n, kMinValuesPerThread / hidden + 1,
                           [&](std::int64_t begin, std::int64_t end, int) {
                             for (std::int64_t i = begin; i < end; ++i) {
                               const float share = kernels.sum_abs(y.row(i), hidden) / group;
                               float& out = norm[first + i];
                               out = h % group == 0 ? share : out + share;
                             }
                           });
    }
  }
}

void normalize_value_norms(Rows norms) {
  for (std::int64_t t = 0; t < norms.width; ++t) {
    float sum = 0.0F;
    for (std::int64_t h = 0; h < norms.n_rows; ++h) sum += norms.row(h)[t];
    for (std::int64_t h = 0; h < norms.n_rows; ++h) {
      float& norm = norms.row(h)[t];
      norm = sum > 0.0F ? norm / sum : 0.0F;
    }
  }
}

}  // namespace spindle::kernels
