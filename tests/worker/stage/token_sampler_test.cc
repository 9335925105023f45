#include "worker/stage/token_sampler.h"

#include <gtest/gtest.h>

#include <vector>

namespace spindle::worker {
namespace {

control::OpenSequence greedy_sequence(std::uint64_t id, int prompt_tokens) {
  control::OpenSequence open;
  open.set_sequence(id);
  open.set_prompt_tokens(prompt_tokens);
  open.set_max_tokens(100);
  control::Sampling& sampling = *open.mutable_sampling();
  sampling.set_temperature(0);
  sampling.set_top_p(1);
  sampling.set_repetition_penalty(1);
  sampling.set_n_logprobs(-1);
  return open;
}

class TokenSamplerTest : public testing::Test {
 protected:
  // As a stage draws.
  control::Sampled drawn(const SampleRequest& request, std::span<const float> logits) {
    const kernels::SampleHistory history{request.prompt_ids, request.output_ids, request.bias,
                                         request.banned};
    const std::int32_t token =
        kernels::sample(*context_, logits, request.params, history, request.key, workspace_);
    return sampler_.report(request, token, logits);
  }
  control::Sampled sample(std::uint64_t sequence, std::span<const float> logits) {
    return drawn(sampler_.request(sequence, 0), logits);
  }
  control::Sampled sample_first(std::uint64_t parent, const control::OpenSequence& choice,
                                std::span<const float> logits) {
    return drawn(sampler_.first_request(parent, choice, 0), logits);
  }

  kernels::SampleWorkspace workspace_;
  std::unique_ptr<CpuContext> context_ = *CpuContext::create({1, CpuIsa::kAvx512});
  TokenSampler sampler_{*context_};
  // Token 2 is best, then 1, then 3.
  const std::vector<float> logits_ = {0.0F, 3.0F, 4.0F, 2.5F};
};

TEST_F(TokenSamplerTest, GreedyTakesTheBest) {
  sampler_.open(greedy_sequence(9, 1));
  sampler_.saw(9, std::vector<std::int32_t>{2});
  const control::Sampled sampled = sample(9, logits_);
  EXPECT_EQ(sampled.token(), 2);
  EXPECT_EQ(sampled.sequence(), 9u);
  EXPECT_EQ(sampled.top_size(), 0);
}

TEST_F(TokenSamplerTest, PresencePenaltyCountsOutputOnly) {
  control::OpenSequence open = greedy_sequence(1, 1);
  open.mutable_sampling()->set_presence_penalty(2);
  sampler_.open(open);
  sampler_.saw(1, std::vector<std::int32_t>{2});  // the prompt
  EXPECT_EQ(sample(1, logits_).token(), 2);
  sampler_.saw(1, std::vector<std::int32_t>{2});  // output: 4 - 2 < 3
  EXPECT_EQ(sample(1, logits_).token(), 1);
  sampler_.saw(1, std::vector<std::int32_t>{1});  // 3 - 2 < 2.5
  EXPECT_EQ(sample(1, logits_).token(), 3);
}

TEST_F(TokenSamplerTest, BannedUntilMinTokens) {
  control::OpenSequence open = greedy_sequence(1, 2);
  open.mutable_sampling()->set_min_tokens(1);
  open.mutable_sampling()->add_banned_before_min(2);
  sampler_.open(open);
  sampler_.saw(1, std::vector<std::int32_t>{0, 0});
  EXPECT_EQ(sample(1, logits_).token(), 1);
  sampler_.saw(1, std::vector<std::int32_t>{1});
  EXPECT_EQ(sample(1, logits_).token(), 2);
}

TEST_F(TokenSamplerTest, AForkRemembersTheParentsPrompt) {
  control::OpenSequence open = greedy_sequence(1, 1);
  open.mutable_sampling()->set_repetition_penalty(2);  // 4 / 2 < 3
  sampler_.open(open);
  sampler_.saw(1, std::vector<std::int32_t>{2});
  control::OpenSequence child = open;
  child.set_sequence(2);
  EXPECT_EQ(sample_first(1, child, logits_).token(), 1);
  sampler_.fork(1, child);
  sampler_.free(1);
  sampler_.saw(2, std::vector<std::int32_t>{1});  // 3 / 2 < 2.5
  EXPECT_EQ(sample(2, logits_).token(), 3);
}

TEST_F(TokenSamplerTest, ChoicesDrawDifferentNumbers) {
  control::OpenSequence open = greedy_sequence(1, 1);
  open.mutable_sampling()->set_temperature(1);
  open.mutable_sampling()->set_seed(7);
  sampler_.open(open);
  sampler_.saw(1, std::vector<std::int32_t>{0});
  const std::vector<float> flat(1000, 0.0F);
  const std::int32_t first = sample(1, flat).token();
  EXPECT_EQ(sample(1, flat).token(), first);  // a pure function of the key
  control::OpenSequence other = open;
  other.set_sequence(2);
  other.mutable_sampling()->set_choice(1);
  EXPECT_NE(sample_first(1, other, flat).token(), first);
}

TEST_F(TokenSamplerTest, NoFiniteLogitGivesNoToken) {
  sampler_.open(greedy_sequence(1, 1));
  const std::vector<float> bad(8, std::numeric_limits<float>::quiet_NaN());
  EXPECT_EQ(sample(1, bad).token(), -1);
}

}  // namespace
}  // namespace spindle::worker
