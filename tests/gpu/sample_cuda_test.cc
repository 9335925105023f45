#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "kernels/core/cpu_context.h"
#include "kernels/sample.h"
#include "tests/gpu/gpu_fixture.h"

namespace spindle::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What one row asks for, as both bodies take it.
struct Request {
  SampleParams params;
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> output;
  std::vector<LogitBias> bias;
  std::vector<std::int32_t> banned;
  SampleKey key;
  std::int32_t logits_row = 0;

  SampleHistory history() const { return {prompt, output, bias, banned}; }
};

class SampleCudaTest : public testing::GpuTest {
 protected:
  // One list entry per id, as the caller of the CUDA body makes them.
  static std::vector<DeviceSampleAdjust> adjusts_of(const Request& request) {
    std::map<std::int32_t, DeviceSampleAdjust> by_id;
    for (const std::int32_t id : request.prompt) by_id[id].seen = 1;
    for (const std::int32_t id : request.output) {
      by_id[id].seen = 1;
      ++by_id[id].n_output;
    }
    for (const LogitBias& entry : request.bias) by_id[entry.id].bias += entry.bias;
    for (const std::int32_t id : request.banned) by_id[id].banned = 1;
    std::vector<DeviceSampleAdjust> out;
    for (auto& [id, adjust] : by_id) {
      adjust.id = id;
      out.push_back(adjust);
    }
    return out;
  }

  std::vector<std::int32_t> on_gpu(const std::vector<float>& logits, std::int64_t n_vocab,
                                   std::int64_t stride, const std::vector<Request>& requests) {
    std::vector<DeviceSampleRow> rows;
    std::vector<DeviceSampleAdjust> adjusts;
    for (const Request& request : requests) {
      const std::vector<DeviceSampleAdjust> own = adjusts_of(request);
      DeviceSampleRow row;
      row.params = request.params;
      row.uniform = sample_uniform(request.key);
      row.logits_row = request.logits_row;
      row.first_adjust = static_cast<std::int32_t>(adjusts.size());
      row.n_adjust = static_cast<std::int32_t>(own.size());
      adjusts.insert(adjusts.end(), own.begin(), own.end());
      rows.push_back(row);
    }
    const int n = static_cast<int>(rows.size());
    const auto device_logits = upload(logits);
    const auto device_rows = upload(rows);
    const auto device_adjusts = upload(adjusts);
    const std::size_t workspace_bytes = sample_workspace_bytes(n, n_vocab);
    const auto workspace = device<std::byte>(workspace_bytes);
    const auto sampled = device<DeviceSampled>(rows.size());
    const std::int64_t n_rows = static_cast<std::int64_t>(logits.size()) / stride;
    sample(gpu(), ConstRows(device_logits.data(), n_rows, n_vocab, stride), device_rows.data(), n,
           device_adjusts.data(), workspace.data(), workspace_bytes, sampled.data());
    std::vector<std::int32_t> tokens;
    for (const DeviceSampled& one : sampled.to_host()) tokens.push_back(one.token);
    workspace.check_guard();
    EXPECT_EQ(
        std::memcmp(device_logits.to_host().data(), logits.data(), logits.size() * sizeof(float)),
        0)
        << "the logits were changed";
    return tokens;
  }

  // Every token must be the CPU's, or one that the CPU draws within 1e-5 of the number.
  void check(const std::vector<float>& logits, std::int64_t n_vocab, std::int64_t stride,
             const std::vector<Request>& requests) {
    const std::vector<std::int32_t> got = on_gpu(logits, n_vocab, stride, requests);
    const auto cpu = CpuContext::create({.n_threads = 1}).value();
    SampleWorkspace workspace;
    int n_others = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const Request& request = requests[i];
      const std::span<const float> row(logits.data() + request.logits_row * stride,
                                       static_cast<std::size_t>(n_vocab));
      const std::int32_t expected =
          sample(*cpu, row, request.params, request.history(), request.key, workspace);
      if (got[i] == expected) continue;
      ++n_others;
      const double uniform = sample_uniform(request.key);
      std::vector<float> penalised(row.begin(), row.end());
      apply_penalties(penalised, request.params, request.history(), workspace);
      apply_bias(penalised, request.bias);
      apply_mask(penalised, request.banned);
      bool near = false;
      for (int step = -20; step <= 20 && !near; ++step) {
        const double other = std::clamp(uniform + step * 0.5e-6, 0.0, 0x1.fffffffffffffp-1);
        near = draw(*cpu, penalised, request.params, other, workspace) == got[i];
      }
      const SampleParams& p = request.params;
      EXPECT_TRUE(near) << "row " << i << " of vocabulary " << n_vocab << ": " << got[i]
                        << " instead of " << expected << "; temperature " << p.temperature
                        << " top_k " << p.top_k << " top_p " << p.top_p << " min_p " << p.min_p
                        << " uniform " << uniform << " logits row " << request.logits_row;
    }
    EXPECT_LE(n_others, 1 + static_cast<int>(requests.size() / 50));
  }

  Request request(SampleParams params) {
    Request out;
    out.params = params;
    out.key = {random()(), random()(), 0, static_cast<std::uint32_t>(random()())};
    return out;
  }
  std::vector<std::int32_t> ids(int n, std::int64_t n_vocab) {
    std::vector<std::int32_t> out;
    // Some lie outside, which both bodies ignore.
    for (int i = 0; i < n; ++i) out.push_back(uniform_int(-3, static_cast<int>(n_vocab) + 3));
    return out;
  }
  template <typename T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[uniform_int(0, static_cast<int>(values.size()) - 1)];
  }

  Request random_request(std::int64_t n_vocab) {
    Request out = request({.temperature = one_of({0.0F, 0.05F, 0.7F, 1.0F, 1.0F, 3.0F, 50.0F}),
                           .top_k = one_of({0, 0, 1, 5, 50, 1000, 3000, 1 << 20}),
                           .top_p = one_of({1.0F, 1.0F, 0.05F, 0.5F, 0.9F, 0.99F}),
                           .min_p = one_of({0.0F, 0.0F, 0.02F, 0.3F, 1.0F}),
                           .repetition_penalty = one_of({1.0F, 1.3F, 0.8F}),
                           .presence_penalty = one_of({0.0F, 0.7F}),
                           .frequency_penalty = one_of({0.0F, 0.2F})});
    if (uniform_int(0, 1) == 0) return out;
    out.prompt = ids(uniform_int(0, 600), n_vocab);
    out.output = ids(uniform_int(0, 100), n_vocab);
    for (int i = uniform_int(0, 5); i > 0; --i) out.output.push_back(7);
    for (const std::int32_t id : ids(uniform_int(0, 20), n_vocab)) {
      // An id once, so that both bodies add the same floats.
      out.bias.push_back({id, normal(1, 5.0F)[0]});
    }
    std::sort(out.bias.begin(), out.bias.end(),
              [](const LogitBias& a, const LogitBias& b) { return a.id < b.id; });
    out.bias.erase(std::unique(out.bias.begin(), out.bias.end(),
                               [](const LogitBias& a, const LogitBias& b) { return a.id == b.id; }),
                   out.bias.end());
    out.banned = ids(uniform_int(0, 20), n_vocab);
    return out;
  }

  // Rows of several kinds: flat, spread, steep, and with many equal values.
  std::vector<float> random_logits(std::int64_t n_vocab, std::int64_t stride) {
    std::vector<float> out;
    for (const float scale : {0.3F, 1.5F, 4.0F, 12.0F}) {
      const std::vector<float> row = normal(static_cast<std::size_t>(stride), scale);
      out.insert(out.end(), row.begin(), row.end());
    }
    for (const float scale : {0.5F, 3.0F}) {
      for (const float value : normal(static_cast<std::size_t>(stride), scale)) {
        out.push_back(std::round(value * 8.0F) / 8.0F);
      }
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (static_cast<std::int64_t>(i) % stride >= n_vocab) out[i] = kNan;  // between rows
    }
    return out;
  }
};

TEST_F(SampleCudaTest, DrawsTheCpusTokens) {
  for (const std::int64_t n_vocab : {1, 17, 1000, 4096, 4097, 32000, 50257, 128256, 262144}) {
    const std::int64_t stride = n_vocab + (n_vocab % 2 == 0 ? 0 : 3);
    const std::vector<float> logits = random_logits(n_vocab, stride);
    std::vector<Request> requests;
    for (int i = 0; i < (n_vocab > 100000 ? 60 : 200); ++i) {
      requests.push_back(random_request(n_vocab));
      requests.back().logits_row = uniform_int(0, 5);
    }
    check(logits, n_vocab, stride, requests);
  }
}

TEST_F(SampleCudaTest, GreedyTakesTheLowestOfEqualIds) {
  std::vector<float> logits(9000, -1.0F);
  logits[8999] = logits[5000] = logits[4095] = 2.0F;
  EXPECT_EQ(on_gpu(logits, 9000, 9000, {request({.temperature = 0.0F})})[0], 4095);
  Request banned = request({.temperature = 0.0F});
  banned.banned = {4095};
  EXPECT_EQ(on_gpu(logits, 9000, 9000, {banned})[0], 5000);
  // Zeros of both signs are equal.
  std::vector<float> zeros(100, -1.0F);
  zeros[10] = -0.0F;
  zeros[20] = 0.0F;
  EXPECT_EQ(on_gpu(zeros, 100, 100, {request({.temperature = 0.0F})})[0], 10);
}

TEST_F(SampleCudaTest, RowsThatHaveNoTokenOrOnlyOne) {
  const std::int64_t n_vocab = 5000;
  const auto n = static_cast<std::size_t>(n_vocab);
  std::vector<float> logits;
  const auto add_row = [&](std::size_t id, float value, float others) {
    std::vector<float> row = others == 1.0F ? normal(n) : std::vector<float>(n, others);
    row[id] = value;
    logits.insert(logits.end(), row.begin(), row.end());
  };
  add_row(4999, kNan, 1.0F);
  add_row(0, -kInfinity, -kInfinity);
  add_row(4500, kInfinity, 1.0F);
  add_row(4321, 0.0F, -kInfinity);
  add_row(10, 3e38F, -3e38F);
  add_row(0, 0.25F, 0.25F);
  std::vector<Request> requests;
  for (int row = 0; row < 6; ++row) {
    for (const SampleParams& params :
         {SampleParams{.temperature = 0.0F}, SampleParams{}, SampleParams{.top_k = 40},
          SampleParams{.top_p = 0.9F}, SampleParams{.temperature = 1e-40F},
          SampleParams{.temperature = 1e-30F, .top_p = 0.5F},
          SampleParams{.top_k = 40, .top_p = 0.9F, .min_p = 0.5F}, SampleParams{.min_p = 1.0F}}) {
      requests.push_back(request(params));
      requests.back().logits_row = row;
    }
  }
  const std::vector<std::int32_t> got = on_gpu(logits, n_vocab, n_vocab, requests);
  for (std::size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(got[i], -1) << i;
    EXPECT_EQ(got[8 + i], -1) << i;
    EXPECT_EQ(got[16 + i], 4500) << i;
    EXPECT_EQ(got[24 + i], 4321) << i;
    EXPECT_EQ(got[32 + i], 10) << i;
  }
  check(logits, n_vocab, n_vocab, requests);
  // A masked NaN does no harm; a mask over everything leaves no token.
  Request masked = request({});
  masked.banned = {4999};
  EXPECT_GE(on_gpu(logits, n_vocab, n_vocab, {masked})[0], 0);
  Request nothing = request({});
  nothing.logits_row = 3;
  nothing.banned = {4321};
  EXPECT_EQ(on_gpu(logits, n_vocab, n_vocab, {nothing})[0], -1);
}

// All limits fall among equal logits, so that ids decide, with and without the list in shared
// memory.
TEST_F(SampleCudaTest, LimitsAmongEqualLogits) {
  for (const std::int64_t n_vocab : {3000, 100000}) {
    const std::vector<float> logits(static_cast<std::size_t>(n_vocab), 1.5F);
    std::vector<Request> requests;
    for (int i = 0; i < 60; ++i) {
      requests.push_back(request({.top_k = one_of({0, 1, 10, 2999, 70000}),
                                  .top_p = one_of({1.0F, 0.1F, 0.7F}),
                                  .min_p = one_of({0.0F, 1.0F})}));
    }
    check(logits, n_vocab, n_vocab, requests);
  }
}

TEST_F(SampleCudaTest, ARowDoesNotDependOnTheOthers) {
  const std::int64_t n_vocab = 32000;
  const std::vector<float> logits = random_logits(n_vocab, n_vocab);
  std::vector<Request> requests;
  for (int i = 0; i < 40; ++i) {
    requests.push_back(random_request(n_vocab));
    requests.back().logits_row = uniform_int(0, 5);
  }
  const std::vector<std::int32_t> together = on_gpu(logits, n_vocab, n_vocab, requests);
  EXPECT_EQ(on_gpu(logits, n_vocab, n_vocab, requests), together);
  for (std::size_t i = 0; i < requests.size(); i += 7) {
    EXPECT_EQ(on_gpu(logits, n_vocab, n_vocab, {requests[i]})[0], together[i]);
  }
}

TEST_F(SampleCudaTest, NoRows) {
  sample(gpu(), ConstRows(nullptr, 0, 100), nullptr, 0, nullptr, nullptr, 0, nullptr);
  EXPECT_GT(sample_workspace_bytes(4, 128256), 4U * 128256U * sizeof(float));
}

}  // namespace
}  // namespace spindle::kernels
