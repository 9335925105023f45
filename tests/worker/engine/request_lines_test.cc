#include "worker/engine/request_lines.h"

#include <gtest/gtest.h>

namespace spindle::worker {
namespace {

TEST(RequestLines, SayWhatARequestAsksAndWhatBecameOfIt) {
  engine::EngineRequest request;
  request.prompt_ids = {1, 2, 3};
  request.sampling.max_tokens = 64;
  request.sampling.n_choices = 2;
  request.priority = -5;
  request.kv_policy.profile = kvstore::KvProfile::kSnapKv;
  EXPECT_EQ(accepted_line(request),
            "accepted: 3 prompt tokens, up to 64 generated, n 2, priority -5, KV policy snapkv");
  engine::RequestSummary summary;
  summary.prompt_tokens = 3;
  summary.completion_tokens = 60;
  summary.queue_ms = 0.44;
  summary.time_to_first_token_ms = 21;
  summary.total_ms = 801.25;
  summary.kv = {{.stage = 0, .full_bytes = 1'000'000, .kept_bytes = 200'000, .layers = {}},
                {.stage = 1, .full_bytes = 1'000'000, .kept_bytes = 296'000, .layers = {}}};
  EXPECT_EQ(ended_line(ok_status(), summary),
            "finished: 3 prompt and 60 generated tokens, queued 0.4 ms, first token after 21.0 ms, "
            "done after 801.2 ms, KV 24.8 % of 2.0 MB");
  EXPECT_EQ(ended_line(cancelled("the request was cancelled"), {}),
            "cancelled: 0 prompt and 0 generated tokens");
  EXPECT_EQ(ended_line(deadline_exceeded("its time was up"), {}),
            "failed: DEADLINE_EXCEEDED: its time was up: 0 prompt and 0 generated tokens");
}

}  // namespace
}  // namespace spindle::worker
