#include "cluster/api/request_validation.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

namespace spindle::api {
namespace {

engine::EngineLimits test_limits() {
  engine::EngineLimits limits;
  limits.vocab_size = 100;
  limits.max_model_len = 64;
  return limits;
}

std::optional<ApiError> validate(const SamplingRequest& request) {
  ValidatedSampling out;
  return validate_sampling(request, test_limits(), config::Limits(), {}, out);
}

// Every bound, with the last value inside and the first outside.
struct Bound {
  std::string param;
  std::function<void(SamplingRequest&, double)> set;
  double inside;
  double outside;
};

std::vector<Bound> bounds() {
  const double next_up = std::nextafter(1.0, 2.0);
  const auto temperature = [](SamplingRequest& r, double v) { r.temperature = v; };
  const auto top_p = [](SamplingRequest& r, double v) { r.top_p = v; };
  const auto min_p = [](SamplingRequest& r, double v) { r.min_p = v; };
  const auto repetition = [](SamplingRequest& r, double v) { r.repetition_penalty = v; };
  const auto presence = [](SamplingRequest& r, double v) { r.presence_penalty = v; };
  const auto frequency = [](SamplingRequest& r, double v) { r.frequency_penalty = v; };
  const auto n = [](SamplingRequest& r, double v) { r.n = static_cast<std::int64_t>(v); };
  const auto top_k = [](SamplingRequest& r, double v) { r.top_k = static_cast<std::int64_t>(v); };
  const auto max_tokens = [](SamplingRequest& r, double v) {
    r.max_tokens = static_cast<std::int64_t>(v);
  };
  const auto min_tokens = [](SamplingRequest& r, double v) {
    r.max_tokens = 64;
    r.min_tokens = static_cast<std::int64_t>(v);
  };
  const auto logprobs = [](SamplingRequest& r, double v) {
    r.logprobs = static_cast<std::int64_t>(v);
  };
  const auto bias_id = [](SamplingRequest& r, double v) {
    r.logit_bias = {{static_cast<std::int64_t>(v), 1.0}};
  };
  const auto bias = [](SamplingRequest& r, double v) { r.logit_bias = {{1, v}}; };
  const auto bias_count = [](SamplingRequest& r, double v) {
    r.logit_bias.assign(static_cast<std::size_t>(v), {1, 1.0});
  };
  const auto stop_id = [](SamplingRequest& r, double v) {
    r.stop_token_ids = {static_cast<std::int64_t>(v)};
  };
  const auto stop_id_count = [](SamplingRequest& r, double v) {
    r.stop_token_ids.assign(static_cast<std::size_t>(v), 1);
  };
  const auto stop_count = [](SamplingRequest& r, double v) {
    r.stop.assign(static_cast<std::size_t>(v), "x");
  };
  const auto stop_bytes = [](SamplingRequest& r, double v) {
    r.stop = {std::string(static_cast<std::size_t>(v), 'x')};
  };
  return {
      {"temperature", temperature, 0, -0.001},
      {"temperature", temperature, 2, 2.001},
      {"top_p", top_p, 0.001, 0},
      {"top_p", top_p, 1, next_up},
      {"min_p", min_p, 0, -0.001},
      {"min_p", min_p, 1, next_up},
      {"repetition_penalty", repetition, 0.001, 0},
      {"repetition_penalty", repetition, 10, 10.001},
      {"presence_penalty", presence, -2, -2.001},
      {"presence_penalty", presence, 2, 2.001},
      {"frequency_penalty", frequency, -2, -2.001},
      {"frequency_penalty", frequency, 2, 2.001},
      {"n", n, 1, 0},
      {"n", n, 16, 17},
      {"top_k", top_k, -1, -2},
      {"top_k", top_k, 2147483647.0, 2147483648.0},
      {"max_tokens", max_tokens, 1, 0},
      {"max_tokens", max_tokens, 2147483647.0, 2147483648.0},
      {"min_tokens", min_tokens, 0, -1},
      {"min_tokens", min_tokens, 64, 65},
      {"logprobs", logprobs, 0, -1},
      {"logprobs", logprobs, 20, 21},
      {"logit_bias", bias_id, 0, -1},
      {"logit_bias", bias_id, 99, 100},
      {"logit_bias", bias, -100, -100.1},
      {"logit_bias", bias, 100, 100.1},
      {"logit_bias", bias_count, 1024, 1025},
      {"stop_token_ids", stop_id, 0, -1},
      {"stop_token_ids", stop_id, 99, 100},
      {"stop_token_ids", stop_id_count, 256, 257},
      {"stop", stop_count, 16, 17},
      {"stop", stop_bytes, 256, 257},
      {"stop", stop_bytes, 1, 0},
  };
}

TEST(RequestValidation, HoldsEveryBoundToTheLastValue) {
  for (const Bound& bound : bounds()) {
    SamplingRequest inside;
    bound.set(inside, bound.inside);
    EXPECT_FALSE(validate(inside).has_value()) << bound.param << " = " << bound.inside;
    SamplingRequest outside;
    bound.set(outside, bound.outside);
    const auto error = validate(outside);
    ASSERT_TRUE(error.has_value()) << bound.param << " = " << bound.outside;
    EXPECT_EQ(error->param, bound.param);
    EXPECT_EQ(error->status.code(), StatusCode::kInvalidArgument);
    EXPECT_NE(error->status.message().find(bound.param.substr(0, 4)), std::string::npos)
        << error->status.message();
  }
}

TEST(RequestValidation, RefusesNumbersThatAreNone) {
  for (const double value :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    for (const Bound& bound : bounds()) {
      if (bound.param != "temperature" && bound.param != "top_p" && bound.param != "min_p")
        continue;
      SamplingRequest request;
      bound.set(request, value);
      EXPECT_TRUE(validate(request).has_value()) << bound.param;
    }
  }
  SamplingRequest tiny;
  tiny.top_p = 1e-300;  // positive, but 0 as a float
  EXPECT_TRUE(validate(tiny).has_value());
}

TEST(RequestValidation, TakesTheModelsDefaultsForFieldsLeftOut) {
  GenerationDefaults defaults;
  defaults.temperature = 0.6F;
  defaults.top_k = 20;
  ValidatedSampling out;
  SamplingRequest request;
  ASSERT_FALSE(validate_sampling(request, test_limits(), {}, defaults, out).has_value());
  EXPECT_EQ(out.params.temperature, 0.6F);
  EXPECT_EQ(out.params.top_k, 20);
  EXPECT_EQ(out.params.top_p, 1.0F);
  EXPECT_EQ(out.params.n_logprobs, -1);
  EXPECT_FALSE(out.params.has_seed);
  request.temperature = 0;
  request.top_k = -1;
  request.seed = 7;
  ASSERT_FALSE(validate_sampling(request, test_limits(), {}, defaults, out).has_value());
  EXPECT_EQ(out.params.temperature, 0.0F);
  EXPECT_EQ(out.params.top_k, 0);
  EXPECT_TRUE(out.params.has_seed);
  request.top_k = 100;  // the whole vocabulary: no restriction
  ASSERT_FALSE(validate_sampling(request, test_limits(), {}, defaults, out).has_value());
  EXPECT_EQ(out.params.top_k, 0);
}

ValidatedSampling with_max_tokens(std::optional<std::int32_t> max_tokens) {
  ValidatedSampling sampling;
  sampling.max_tokens_given = max_tokens.has_value();
  sampling.params.max_tokens = max_tokens.value_or(16);
  return sampling;
}

TEST(RequestValidation, FitsOutputIntoTheContext) {
  ValidatedSampling sampling = with_max_tokens(4);
  EXPECT_FALSE(fit_to_context(60, false, 64, sampling).has_value());
  EXPECT_EQ(sampling.params.max_tokens, 4);
  const auto error = fit_to_context(61, false, 64, sampling);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, "context_length_exceeded");
  EXPECT_EQ(error->param, "max_tokens");

  ValidatedSampling chat = with_max_tokens({});
  EXPECT_FALSE(fit_to_context(60, true, 64, chat).has_value());
  EXPECT_EQ(chat.params.max_tokens, 4);
  ValidatedSampling completion = with_max_tokens({});
  EXPECT_FALSE(fit_to_context(10, false, 64, completion).has_value());
  EXPECT_EQ(completion.params.max_tokens, 16);
  completion = with_max_tokens({});
  EXPECT_FALSE(fit_to_context(63, false, 64, completion).has_value());
  EXPECT_EQ(completion.params.max_tokens, 1);
  const auto full = fit_to_context(64, true, 64, chat);
  ASSERT_TRUE(full.has_value());
  EXPECT_EQ(full->code, "context_length_exceeded");
  EXPECT_EQ(full->param, "messages");
}

TEST(RequestValidation, ComparesMinTokensWithWhatMayBeGenerated) {
  ValidatedSampling sampling = with_max_tokens({});
  sampling.params.min_tokens = 17;
  const auto error = fit_to_context(1, false, 64, sampling);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->param, "min_tokens");
}

}  // namespace
}  // namespace spindle::api
