#include "cluster/comm/mailbox.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>

namespace spindle::comm {
namespace {

Deadline now() { return Deadline::after_ms(0); }
Deadline soon() { return Deadline::after_ms(5000); }

TEST(Mailbox, KeepsArrivalOrderAndTheOrderOfEachSource) {
  Mailbox box(3, 1000);
  ASSERT_TRUE(box.push(2, "a", now()).ok());
  ASSERT_TRUE(box.push(1, "b", now()).ok());
  ASSERT_TRUE(box.push(2, "c", now()).ok());
  EXPECT_FALSE(box.pop(0, now())->has_value());
  EXPECT_EQ(box.pop(1, now()).value()->bytes, "b");
  EXPECT_EQ(box.pop(kAnySource, now()).value()->bytes, "a");
  EXPECT_EQ(box.pop(kAnySource, now()).value()->bytes, "c");
}

TEST(Mailbox, AFullSourceWaitsForRoomAndBlocksNobodyElse) {
  Mailbox box(2, 10);
  ASSERT_TRUE(box.push(0, "12345678", now()).ok());
  EXPECT_EQ(box.push(0, "abc", now()).code(), StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(box.push(1, "abc", now()).ok());
  std::thread reader([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(box.pop(0, now()).value()->bytes, "12345678");
  });
  EXPECT_TRUE(box.push(0, "abc", soon()).ok());
  reader.join();
}

TEST(Mailbox, CloseWakesReadersAndWriters) {
  Mailbox box(1, 4);
  ASSERT_TRUE(box.push(0, "full", now()).ok());
  std::thread writer([&] { EXPECT_EQ(box.push(0, "more", soon()).message(), "closed"); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  box.close(unavailable("closed"));
  box.close(unavailable("again"));
  writer.join();
  EXPECT_EQ(box.pop(kAnySource, soon()).status().message(), "closed");
}

TEST(Mailbox, EachSideCanEndAlone) {
  Mailbox box(2, 100);
  box.end_writing(0, unavailable("writer left"));
  EXPECT_EQ(box.push(0, "x", now()).message(), "writer left");
  EXPECT_TRUE(box.push(1, "y", now()).ok());
  box.end_reading(unavailable("reader left"));
  EXPECT_EQ(box.pop(1, now()).status().message(), "reader left");
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(box.push(1, std::string(100, 'z'), now()).ok());
}

}  // namespace
}  // namespace spindle::comm
