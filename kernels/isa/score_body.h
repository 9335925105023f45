// Row operations of the token scores. Included inside an anonymous namespace by the per-ISA
// translation units, after math_body.h.
//
// Maxima leave NaN out; sums carry it. Element-wise results are the same on every instruction set.

float dot_of(const float* a, const float* b, std::int64_t n) {
  V sums[2] = {splat(0.0F), splat(0.0F)};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sums[0] = fma(load(a + i), load(b + i), sums[0]);
    sums[1] = fma(load(a + i + kLanes), load(b + i + kLanes), sums[1]);
  }
  for (; i < n; i += kLanes) {
    const std::int64_t count = n - i < kLanes ? n - i : kLanes;
    sums[0] = fma(load_part(a + i, count), load_part(b + i, count), sums[0]);
  }
  return sum_lanes(sums[0] + sums[1]);
}

float sum_abs_row(const float* x, std::int64_t n) {
  const V zero = splat(0.0F);
  V sums[4] = {zero, zero, zero, zero};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int lane_group = 0; lane_group < 4; ++lane_group) {
      const V v = load(x + i + lane_group * kLanes);
      sums[lane_group] = sums[lane_group] + at_least(v, zero - v);
    }
  }
  for (; i < n; i += kLanes) {
    const V v = load_part(x + i, n - i < kLanes ? n - i : kLanes);
    sums[0] = sums[0] + at_least(v, zero - v);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// fp64 in 16 lanes (lane = i mod 16) on every instruction set.
double sum_row(const float* x, std::int64_t n) {
  double lanes[16] = {};
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) lanes[j] += static_cast<double>(x[i + j]);
  }
  for (int j = 0; i < n; ++i, ++j) lanes[j] += static_cast<double>(x[i]);
  for (int step = 8; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) lanes[j] += lanes[j + step];
  }
  return lanes[0];
}

void scale_row(float factor, std::int64_t n, float* x) {
  for (std::int64_t i = 0; i < n; ++i) x[i] *= factor;
}

void add_scaled_row(const float* x, double factor, std::int64_t n, double* sums) {
  for (std::int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(x[i]) * factor;
}

void max_into_row(const float* x, std::int64_t n, float* best) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(best + i, at_least(load(x + i), load(best + i)));
  for (; i < n; ++i) best[i] = x[i] > best[i] ? x[i] : best[i];
}

void pooled_max_into_row(const float* x, std::int64_t n, std::int64_t begin, std::int64_t end,
                         float factor, float* best) {
  const auto at = [&](std::int64_t i) { return i >= 0 && i < n ? x[i] : 0.0F; };
  const auto edge = [&](std::int64_t i) {
    const float sum = ((at(i - 2) + at(i - 1)) + at(i)) + (at(i + 1) + at(i + 2));
    const float value = sum * factor;
    best[i - begin] = value > best[i - begin] ? value : best[i - begin];
  };
  std::int64_t i = begin;
  for (; i < end && i < 2; ++i) edge(i);
  const V factors = splat(factor);
  for (; i + kLanes <= end && i + kLanes + 2 <= n; i += kLanes) {
    const float* p = x + i;
    const V sum = ((load(p - 2) + load(p - 1)) + load(p)) + (load(p + 1) + load(p + 2));
    store(best + (i - begin), at_least(sum * factors, load(best + (i - begin))));
  }
  for (; i < end; ++i) edge(i);
}
