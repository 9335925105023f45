#include "worker/trace/trace_messages.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cluster/comm/message.h"

namespace spindle::worker {
namespace {

TEST(TraceMessages, RecordsComeBackAsTheyWere) {
  const auto seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::vector<TraceRecord> records;
  for (int i = 0; i < 500; ++i) {
    TraceRecord record;
    record.kind = static_cast<TraceKind>(random() % kTraceKinds);
    record.step = random();
    record.begin_ns = static_cast<std::int64_t>(random() >> 2);
    record.duration_ns = static_cast<std::int64_t>(random() >> 2);
    record.a = static_cast<std::int64_t>(random());
    record.b = static_cast<std::int64_t>(random());
    record.c = static_cast<std::int64_t>(random());
    records.push_back(record);
  }
  control::OrderReply sent;
  encode(records, sent);
  control::OrderReply reply;
  ASSERT_TRUE(reply.ParseFromString(sent.SerializeAsString()));
  const auto decoded = decode_records(reply, records.size());
  ASSERT_TRUE(decoded.ok()) << decoded.status().to_string();
  EXPECT_EQ(*decoded, records);
  EXPECT_FALSE(decode_records(reply, records.size() - 1).ok());
}

TEST(TraceMessages, TheLargestReplyIsFarBelowTheLimitOfAMessage) {
  TraceRecord worst{.kind = TraceKind::kKvUsed,
                    .step = std::numeric_limits<std::uint64_t>::max(),
                    .begin_ns = std::numeric_limits<std::int64_t>::max(),
                    .duration_ns = std::numeric_limits<std::int64_t>::max(),
                    .a = -1,
                    .b = -1,
                    .c = -1};
  control::OrderReply reply;
  encode(std::vector(kRecordsPerReply, worst), reply);
  EXPECT_LT(reply.ByteSizeLong(), comm::kMaxMessageBytes / 16);
}

TEST(TraceMessages, WhatIsNoRecordIsRefused) {
  control::OrderReply reply;
  control::TraceRecord& record = *reply.add_records();
  record.set_kind(kTraceKinds);
  EXPECT_FALSE(decode_records(reply, 1).ok());
  record.set_kind(-1);
  EXPECT_FALSE(decode_records(reply, 1).ok());
  record.set_kind(0);
  EXPECT_TRUE(decode_records(reply, 1).ok());
  record.set_duration_ns(std::numeric_limits<std::uint64_t>::max());
  EXPECT_FALSE(decode_records(reply, 1).ok());
}

}  // namespace
}  // namespace spindle::worker
