#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "cluster/coordinator/scheduler.h"

namespace spindle::coordinator {
namespace {

constexpr engine::EngineLimits kLimits{100, 64, 4, 5, 3};

engine::EngineRequest good() {
  engine::EngineRequest request;
  request.prompt_ids = {1, 2, 3};
  return request;
}

struct BadCase {
  const char* field;  // the message begins with it
  std::function<void(engine::EngineRequest&)> spoil;
};

TEST(ValidateRequest, GoodOnesPassAtTheirBounds) {
  EXPECT_TRUE(validate_request(good(), kLimits).ok());
  engine::EngineRequest request = good();
  request.prompt_ids.assign(63, 99);
  request.sampling.temperature = 0.0F;
  request.sampling.top_k = 100;
  request.sampling.min_p = 1.0F;
  request.sampling.repetition_penalty = 0.01F;
  request.sampling.presence_penalty = -2.0F;
  request.sampling.frequency_penalty = 2.0F;
  request.sampling.logit_bias = {{99, -100.0F}, {0, 100.0F}};
  request.sampling.n_choices = 4;
  request.sampling.max_tokens = 64;
  request.sampling.min_tokens = 64;
  request.sampling.n_logprobs = 5;
  EXPECT_TRUE(validate_request(request, kLimits).ok())
      << validate_request(request, kLimits).to_string();
}

TEST(ValidateRequest, BadOnesNameTheField) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const BadCase cases[] = {
      {"prompt", [](auto& r) { r.prompt_ids.clear(); }},
      {"prompt", [](auto& r) { r.prompt_ids.assign(64, 1); }},
      {"prompt", [](auto& r) { r.prompt_ids[1] = 100; }},
      {"prompt", [](auto& r) { r.prompt_ids[1] = -1; }},
      {"temperature", [](auto& r) { r.sampling.temperature = -0.1F; }},
      {"temperature", [nan](auto& r) { r.sampling.temperature = nan; }},
      {"top_p", [](auto& r) { r.sampling.top_p = 0; }},
      {"top_p", [](auto& r) { r.sampling.top_p = 1.01F; }},
      {"min_p", [](auto& r) { r.sampling.min_p = -0.01F; }},
      {"repetition_penalty", [](auto& r) { r.sampling.repetition_penalty = 0; }},
      {"presence_penalty", [](auto& r) { r.sampling.presence_penalty = 2.1F; }},
      {"frequency_penalty", [](auto& r) { r.sampling.frequency_penalty = -2.1F; }},
      {"top_k", [](auto& r) { r.sampling.top_k = -1; }},
      {"top_k", [](auto& r) { r.sampling.top_k = 101; }},
      {"n must", [](auto& r) { r.sampling.n_choices = 5; }},
      {"n must", [](auto& r) { r.sampling.n_choices = 0; }},
      {"max_tokens", [](auto& r) { r.sampling.max_tokens = 0; }},
      {"max_tokens", [](auto& r) { r.sampling.max_tokens = 65; }},
      {"min_tokens", [](auto& r) { r.sampling.min_tokens = 17; }},
      {"logprobs", [](auto& r) { r.sampling.n_logprobs = 6; }},
      {"logit_bias",
       [](auto& r) {
         r.sampling.logit_bias.assign(4, {1, 0.0F});
       }},
      {"logit_bias",
       [](auto& r) {
         r.sampling.logit_bias = {{100, 0.0F}};
       }},
      {"logit_bias",
       [](auto& r) {
         r.sampling.logit_bias = {{1, 101.0F}};
       }},
      {"logit_bias",
       [nan](auto& r) {
         r.sampling.logit_bias = {{1, nan}};
       }},
      {"stop_token_ids", [](auto& r) { r.sampling.stop_token_ids = {-5}; }},
      {"stop_token_ids", [](auto& r) { r.sampling.stop_token_ids.assign(4, 1); }},
  };
  for (const BadCase& bad : cases) {
    engine::EngineRequest request = good();
    bad.spoil(request);
    const Status status = validate_request(request, kLimits);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.field;
    EXPECT_EQ(status.message().rfind(bad.field, 0), 0u) << status.message();
  }
}

}  // namespace
}  // namespace spindle::coordinator
