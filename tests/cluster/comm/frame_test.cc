#include "cluster/comm/frame.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace spindle::comm {
namespace {

constexpr FrameOrigin kOrigin{.channel = Channel::kResult, .epoch = 7, .source = 3};

TEST(Frame, HasTheDocumentedLayout) {
  const std::string frame = encode_frame(kOrigin, "he", "llo");
  ASSERT_EQ(frame.size(), kFrameHeaderBytes + 5);
  EXPECT_EQ(frame.substr(0, 4), "SPDL");
  EXPECT_EQ(frame[4], 1);   // version
  EXPECT_EQ(frame[6], 2);   // Channel::kResult
  EXPECT_EQ(frame[8], 7);   // epoch
  EXPECT_EQ(frame[12], 3);  // source
  EXPECT_EQ(frame[16], 5);  // length
  EXPECT_EQ(frame.substr(kFrameHeaderBytes), "hello");
}

TEST(Frame, ComesBackAsItWas) {
  for (const std::string& payload : {std::string(), std::string("x"), std::string(70'000, 'y')}) {
    std::string frame = encode_frame(kOrigin, {}, payload);
    ASSERT_TRUE(decode_frame(kOrigin, frame).ok());
    EXPECT_EQ(frame, payload);
  }
}

TEST(Frame, NamesWhatIsForeign) {
  const auto reason = [](FrameOrigin sent) {
    std::string frame = encode_frame(sent, {}, "payload");
    const Status s = decode_frame(kOrigin, frame);
    EXPECT_EQ(s.code(), StatusCode::kInternal);
    return s.message();
  };
  EXPECT_EQ(reason({.channel = Channel::kPlan, .epoch = 7, .source = 3}),
            "bad frame from rank 3: channel 1 on the result channel");
  EXPECT_EQ(reason({.channel = Channel::kResult, .epoch = 6, .source = 3}),
            "bad frame from rank 3: epoch 6, this is 7");
  EXPECT_EQ(reason({.channel = Channel::kResult, .epoch = 7, .source = 2}),
            "bad frame from rank 3: it claims rank 2");
  std::string stranger = "GET / HTTP/1.1\r\nHost: a stranger\r\n\r\n";
  EXPECT_EQ(decode_frame(kOrigin, stranger).message(),
            "bad frame from rank 3: not a Spindle frame");
  std::string stump = "SPDL";
  EXPECT_EQ(decode_frame(kOrigin, stump).message(),
            "bad frame from rank 3: 4 bytes are shorter than the header");
}

TEST(Frame, EveryFlippedBitAndEveryCutIsNoticed) {
  const std::string good = encode_frame(kOrigin, "head", "some payload");
  for (std::size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(decode_frame(kOrigin, bad).ok()) << "bit " << bit;
  }
  for (std::size_t n_bytes = 0; n_bytes < good.size(); ++n_bytes) {
    std::string bad = good.substr(0, n_bytes);
    EXPECT_FALSE(decode_frame(kOrigin, bad).ok()) << n_bytes << " bytes";
  }
  std::string longer = good + "!";
  EXPECT_FALSE(decode_frame(kOrigin, longer).ok());
}

TEST(Frame, RandomDamageIsNoticed) {
  const unsigned seed = std::random_device{}();
  std::mt19937 random(seed);
  const std::string good = encode_frame(kOrigin, {}, std::string(4000, 'z'));
  for (int i = 0; i < 2000; ++i) {
    std::string bad = good;
    const int n_bytes = 1 + static_cast<int>(random() % 8);
    for (int k = 0; k < n_bytes; ++k) {
      bad[random() % bad.size()] = static_cast<char>(random());
    }
    if (bad == good) continue;
    EXPECT_FALSE(decode_frame(kOrigin, bad).ok()) << "seed " << seed << " round " << i;
  }
}

}  // namespace
}  // namespace spindle::comm
