// Row operations and exp on the vector primitives. Included inside an anonymous namespace by the
// per-ISA translation units; no library templates in here (kernel_table.h says why).

// A vector of the first `count` < kLanes values, zeros after.
inline V load_part(const float* p, std::int64_t count) {
  float lanes[kLanes] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
inline void store_part(float* p, V v, std::int64_t count) {
  float lanes[kLanes];
  store(lanes, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// exp to about 1 ulp: x = n ln2 + r, exp(r) = 1 + r + r^2 q(r) with q fitted at Chebyshev nodes of
// [-ln2/2, ln2/2]. Below -86.5 the result is 0; it overflows to infinity as exp does.
inline V exp_of(V x) {
  const V clamped = at_most(splat(89.0F), at_least(splat(-87.0F), x));
  // Adding 1.5 * 2^23 rounds to an integer.
  const V magic = splat(12582912.0F);
  const V n = fma(clamped, splat(1.442695022F), magic) - magic;
  V r = fma(n, splat(-0.693359375F), clamped);
  r = fma(n, splat(2.121944417e-04F), r);
  V q = fma(r, splat(1.392625039e-03F), splat(8.363232948e-03F));
  q = fma(r, q, splat(4.166655242e-02F));
  q = fma(r, q, splat(1.666657627e-01F));
  q = fma(r, q, splat(0.5F));
  const V p = fma(r * r, q, r) + splat(1.0F);
  // Two factors, since 2^128 is not a float.
  const V value = (p + p) * exponent_of(n - splat(1.0F));
  return zero_below(value, x, splat(-86.5F));
}

inline V silu_of(V x) { return x / (splat(1.0F) + exp_of(splat(0.0F) - x)); }

void rms_norm_row(const float* x, const float* weight, float eps, std::int64_t n, float* out) {
  V sums[4] = {splat(0.0F), splat(0.0F), splat(0.0F), splat(0.0F)};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int lane_group = 0; lane_group < 4; ++lane_group) {
      const V v = load(x + i + lane_group * kLanes);
      sums[lane_group] = fma(v, v, sums[lane_group]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) {
    const V v = load(x + i);
    sums[0] = fma(v, v, sums[0]);
  }
  if (i < n) {
    const V v = load_part(x + i, n - i);
    sums[1] = fma(v, v, sums[1]);
  }
  const float sum = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  const float mean = sum / static_cast<float>(n);
  const V scale = splat(1.0F / __builtin_sqrtf(mean + eps));
  for (i = 0; i + kLanes <= n; i += kLanes)
    store(out + i, load(weight + i) * (load(x + i) * scale));
  if (i < n) {
    store_part(out + i, load_part(weight + i, n - i) * (load_part(x + i, n - i) * scale), n - i);
  }
}

void add_row(const float* x, std::int64_t n, float* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}

void swiglu_row(const float* gate, const float* up, std::int64_t n, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, silu_of(load(gate + i)) * load(up + i));
  if (i < n) {
    store_part(out + i, silu_of(load_part(gate + i, n - i)) * load_part(up + i, n - i), n - i);
  }
}

void rope_head(float* head, const float* cos, const float* sin, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[i + half];
    head[i] = low * cos[i] - high * sin[i];
    head[i + half] = high * cos[i] + low * sin[i];
  }
}

void widen_values(ElementFormat format, const void* x, std::int64_t n, float* out) {
  if (format == ElementFormat::kF32) {
    const auto* p = static_cast<const float*>(x);
    for (std::int64_t i = 0; i < n; ++i) out[i] = p[i];
    return;
  }
  const auto* p = static_cast<const std::uint16_t*>(x);
  const bool is_f16 = format == ElementFormat::kF16;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, is_f16 ? load_f16(p + i) : load_bf16(p + i));
  if (i < n) {
    std::uint16_t part[kLanes] = {};
    float wide[kLanes];
    for (std::int64_t j = 0; i + j < n; ++j) part[j] = p[i + j];
    store(wide, is_f16 ? load_f16(part) : load_bf16(part));
    for (std::int64_t j = 0; i + j < n; ++j) out[i + j] = wide[j];
  }
}

float max_of(const float* x, std::int64_t n) {
  V best = splat(-__builtin_inff());
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) best = at_least(load(x + i), best);
  float result = max_lanes(best);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

void exp_shifted_row(const float* x, std::int64_t n, float shift, float scale, float* out) {
  const V shifts = splat(shift);
  const V scales = splat(scale);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_of((load(x + i) - shifts) * scales));
  if (i < n) store_part(out + i, exp_of((load_part(x + i, n - i) - shifts) * scales), n - i);
}

double sum_exp_row(const float* x, std::int64_t n, float shift) {
  // fp32 lanes over short runs, fp64 over the runs: a vocabulary of 150k loses no digits.
  constexpr std::int64_t kRun = 1024;
  double total = 0.0;
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    const std::int64_t end = begin + kRun < n ? begin + kRun : n;
    V sum = splat(0.0F);
    std::int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sum = sum + exp_of(load(x + i) - splat(shift));
    float run = sum_lanes(sum);
    if (i < end) {
      float lanes[kLanes];
      store(lanes, exp_of(load_part(x + i, end - i) - splat(shift)));
      for (std::int64_t j = 0; j < end - i; ++j) run += lanes[j];
    }
    total += static_cast<double>(run);
  }
  return total;
}
