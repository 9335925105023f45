#include "cluster/api/kv_validation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace spindle::api {
namespace {

using kvstore::KvProfile;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

engine::EngineLimits test_limits() {
  engine::EngineLimits limits;
  limits.vocab_size = 100;
  limits.max_model_len = 64;
  return limits;
}

config::Limits server_limits() {
  config::Limits limits;
  limits.set_min_kv_ratio(0.05);
  limits.set_max_compress_points(3);
  limits.set_max_score_tokens(20);
  limits.set_max_dense_scores(5);
  return limits;
}

kvstore::KvPolicy default_policy() {
  kvstore::KvPolicy policy;
  policy.profile = KvProfile::kStreaming;
  policy.ratio = 0.25;
  policy.sinks = 8;
  policy.window = 48;
  policy.lazy_threshold = 0.7;
  policy.lazy_test = kvstore::LazyTest::kDecode;
  policy.overrides.resize(1);
  return policy;
}

GenerateRequest plain() {
  GenerateRequest request;
  request.prompt = std::string("text");
  return request;
}

std::optional<ApiError> validate(const GenerateRequest& request, ValidatedKv& out,
                                 const config::Limits& limits = server_limits()) {
  return validate_kv(request, test_limits(), limits, default_policy(), out);
}

std::optional<ApiError> validate(const GenerateRequest& request) {
  ValidatedKv out;
  return validate(request, out);
}

GenerateRequest with_policy(const KvPolicyRequest& policy) {
  GenerateRequest request = plain();
  request.kv_policy = policy;
  return request;
}

TEST(KvValidation, NothingAskedIsTheServersPolicy) {
  ValidatedKv out;
  ASSERT_FALSE(validate(plain(), out).has_value());
  EXPECT_EQ(out.policy.profile, KvProfile::kStreaming);
  EXPECT_EQ(out.policy.ratio, 0.25);
  EXPECT_EQ(out.policy.sinks, 8);
  EXPECT_EQ(out.policy.overrides.size(), 1U);
  EXPECT_TRUE(out.compress_at.empty());
  EXPECT_EQ(out.scores.end, 0);
}

TEST(KvValidation, WithoutAProfileFieldsChangeTheServersPolicy) {
  ValidatedKv out;
  ASSERT_FALSE(validate(with_policy({.max_bytes = 4096, .recent = 32}), out).has_value());
  EXPECT_EQ(out.policy.profile, KvProfile::kStreaming);
  EXPECT_EQ(out.policy.max_bytes, 4096U);
  EXPECT_EQ(out.policy.ratio, 0.0);  // at most one of the two
  EXPECT_EQ(out.policy.sinks, 8);
  EXPECT_EQ(out.policy.recent, 32);
  EXPECT_EQ(out.policy.window, 48);
  EXPECT_EQ(out.policy.overrides.size(), 1U);
}

TEST(KvValidation, AProfileBringsItsOwnValues) {
  ValidatedKv out;
  ASSERT_FALSE(validate(with_policy({.profile = "simlayerkv", .sinks = 2}), out).has_value());
  EXPECT_EQ(out.policy.profile, KvProfile::kSimLayerKv);
  EXPECT_EQ(out.policy.ratio, 0.0);
  EXPECT_EQ(out.policy.sinks, 2);
  EXPECT_EQ(out.policy.recent, kvstore::KvPolicy().recent);
  EXPECT_EQ(out.policy.window, 0);
  EXPECT_TRUE(out.policy.overrides.empty());
  // No request can set them, so they are the server's.
  EXPECT_EQ(out.policy.lazy_threshold, 0.7);
  EXPECT_EQ(out.policy.lazy_test, kvstore::LazyTest::kDecode);
}

TEST(KvValidation, EveryProfileHasItsName) {
  for (const KvProfile profile : kvstore::all_profiles()) {
    ValidatedKv out;
    const std::string name(kvstore::profile_name(profile));
    ASSERT_FALSE(validate(with_policy({.profile = name}), out).has_value()) << name;
    EXPECT_EQ(out.policy.profile, profile);
  }
}

// The last value inside each bound and the first outside.
struct Bound {
  std::string param;
  std::function<void(GenerateRequest&, double)> set;
  double inside;
  double outside;
};

std::vector<Bound> bounds() {
  const auto whole = [](double value) { return static_cast<std::int64_t>(value); };
  const auto ratio = [](GenerateRequest& r, double v) { r.kv_policy = {.ratio = v}; };
  const auto max_bytes = [&](GenerateRequest& r, double v) {
    r.kv_policy = {.max_bytes = whole(v)};
  };
  const auto sinks = [&](GenerateRequest& r, double v) { r.kv_policy = {.sinks = whole(v)}; };
  const auto recent = [&](GenerateRequest& r, double v) { r.kv_policy = {.recent = whole(v)}; };
  const auto window = [&](GenerateRequest& r, double v) { r.kv_policy = {.window = whole(v)}; };
  const auto position = [&](GenerateRequest& r, double v) { r.compress_at = {whole(v)}; };
  const auto second = [&](GenerateRequest& r, double v) { r.compress_at = {7, whole(v)}; };
  const auto n_positions = [&](GenerateRequest& r, double v) {
    for (std::int64_t i = 1; i <= whole(v); ++i) r.compress_at.push_back(i);
  };
  const auto n_messages = [&](GenerateRequest& r, double v) {
    ChatPrompt chat;
    for (std::int64_t i = 0; i < whole(v); ++i) {
      chat.messages.emplace_back(boost::json::object());
      chat.compress_after.push_back(static_cast<std::size_t>(i));
    }
    r.prompt = std::move(chat);
  };
  const auto session = [&](GenerateRequest& r, double v) {
    r.session_id = std::string(static_cast<std::size_t>(v), 's');
  };
  const auto session_char = [](GenerateRequest& r, double v) {
    r.session_id = std::string("s") + static_cast<char>(v);
  };
  const auto n_kept = [&](GenerateRequest& r, double v) {
    r.session_id = "s";
    r.keep_session = true;
    r.sampling.n = whole(v);
  };
  const auto first = [&](GenerateRequest& r, double v) {
    r.prompt_scores = {.first = whole(v), .end = 20};
  };
  const auto end = [&](GenerateRequest& r, double v) {
    r.prompt_scores = {.first = 50, .end = whole(v)};
  };
  const auto n_scores = [&](GenerateRequest& r, double v) {
    r.prompt_scores = {.first = 3, .end = 3 + whole(v)};
  };
  const auto n_dense = [&](GenerateRequest& r, double v) {
    r.prompt_scores = {.first = 3, .end = 3 + whole(v), .dense = true};
  };
  return {{"kv_policy.ratio", ratio, 1, std::nextafter(1.0, 2.0)},
          {"kv_policy.ratio", ratio, 0.05, 0.0499},  // the server's least
          {"kv_policy.ratio", ratio, 0.5, 0},
          {"kv_policy.ratio", ratio, 0.5, -0.5},
          {"kv_policy.ratio", ratio, 0.5, std::numeric_limits<double>::quiet_NaN()},
          {"kv_policy.max_bytes", max_bytes, 1, 0},
          {"kv_policy.max_bytes", max_bytes, 0x1p60, 0x1p61},
          {"kv_policy.sinks", sinks, 0, -1},
          {"kv_policy.sinks", sinks, 64, 65},
          {"kv_policy.recent", recent, 0, -1},
          {"kv_policy.recent", recent, 64, 65},
          {"kv_policy.window", window, 1, 0},
          {"kv_policy.window", window, 64, 65},
          {"compress_at", position, 1, 0},
          {"compress_at", position, 64, 65},
          {"compress_at", second, 8, 7},
          {"compress_at", n_positions, 3, 4},
          {"messages", n_messages, 3, 4},
          {"session_id", session, 128, 129},
          {"session_id", session_char, '!', ' '},
          {"session_id", session_char, '~', 0x7f},
          {"session_id", session_char, 'a', 0xe9},
          {"keep_session", n_kept, 1, 2},
          {"prompt_scores.first", first, 1, 0},
          {"prompt_scores.first", first, 19, 65},
          {"prompt_scores.end", first, 19, 20},
          {"prompt_scores.end", end, 64, 65},
          {"prompt_scores.end", end, 51, 50},
          {"prompt_scores.end", n_scores, 20, 21},
          {"prompt_scores.dense", n_dense, 5, 6}};
}

TEST(KvValidation, RefusesWhatIsOutsideAndNamesIt) {
  for (const Bound& bound : bounds()) {
    GenerateRequest inside = plain();
    bound.set(inside, bound.inside);
    const auto none = validate(inside);
    EXPECT_FALSE(none.has_value())
        << bound.param << " = " << bound.inside << ": " << none->status.message();
    GenerateRequest outside = plain();
    bound.set(outside, bound.outside);
    const auto error = validate(outside);
    ASSERT_TRUE(error.has_value()) << bound.param << " = " << bound.outside;
    EXPECT_EQ(error->param, bound.param) << error->status.message();
    EXPECT_EQ(error->status.code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(error->status.message().empty());
  }
}

TEST(KvValidation, RefusesWhatDoesNotGoTogether) {
  EXPECT_EQ(validate(with_policy({.ratio = 0.5, .max_bytes = 9}))->param, "kv_policy.max_bytes");
  const auto unknown = validate(with_policy({.profile = "best"}));
  EXPECT_EQ(unknown->param, "kv_policy.profile");
  EXPECT_THAT(unknown->status.message(), HasSubstr("full, spindle, spindlekv"));

  GenerateRequest unnamed = plain();
  unnamed.keep_session = true;
  EXPECT_EQ(validate(unnamed)->param, "keep_session");

  GenerateRequest both = plain();
  ChatPrompt chat;
  chat.messages.emplace_back(boost::json::object());
  chat.compress_after = {0};
  both.prompt = std::move(chat);
  both.compress_at = {3};
  EXPECT_EQ(validate(both)->param, "compress_at");
}

TEST(KvValidation, AServerMayKeepItsPolicy) {
  config::Limits limits = server_limits();
  limits.set_allow_kv_policy(false);
  ValidatedKv out;
  EXPECT_FALSE(validate(plain(), out, limits).has_value());
  EXPECT_EQ(validate(with_policy({}), out, limits)->param, "kv_policy");
}

// Vocabularies so large that the configured number of positions would be too many bytes.
TEST(KvValidation, DenseScoresAreBoundedInBytes) {
  config::Limits limits = server_limits();
  limits.set_max_dense_scores(1 << 20);
  limits.set_max_score_tokens(1 << 20);
  engine::EngineLimits engine_limits = test_limits();
  engine_limits.vocab_size = 1 << 20;  // 4 MiB for each position
  GenerateRequest request = plain();
  ValidatedKv out;
  request.prompt_scores = {.first = 1, .end = 17, .dense = true};
  EXPECT_FALSE(validate_kv(request, engine_limits, limits, {}, out).has_value());
  request.prompt_scores->end = 18;
  EXPECT_EQ(validate_kv(request, engine_limits, limits, {}, out)->param, "prompt_scores.dense");
}

TEST(KvValidation, HugeNumbersDoNotOverflow) {
  constexpr auto kMost = std::numeric_limits<std::int64_t>::max();
  constexpr auto kLeast = std::numeric_limits<std::int64_t>::min();
  GenerateRequest request = plain();
  request.prompt_scores = {.first = kLeast, .end = kMost};
  EXPECT_EQ(validate(request)->param, "prompt_scores.first");
  request = plain();
  request.compress_at = {kMost};
  EXPECT_EQ(validate(request)->param, "compress_at");
  EXPECT_EQ(validate(with_policy({.window = kMost}))->param, "kv_policy.window");
}

TEST(KvValidation, ThePromptsLengthDecidesTheRest) {
  GenerateRequest request = plain();
  request.compress_at = {5, 10};
  request.prompt_scores = {.first = 3, .end = 9};
  ValidatedKv out;
  ASSERT_FALSE(validate(request, out).has_value());
  EXPECT_THAT(out.compress_at, ElementsAre(5, 10));
  EXPECT_FALSE(fit_to_prompt(out, 10).has_value());
  EXPECT_EQ(fit_to_prompt(out, 9)->param, "compress_at");
  out.compress_at.clear();
  EXPECT_FALSE(fit_to_prompt(out, 9).has_value());
  EXPECT_EQ(fit_to_prompt(out, 8)->param, "prompt_scores.end");
}

}  // namespace
}  // namespace spindle::api
