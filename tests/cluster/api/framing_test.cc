#include "cluster/api/framing.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

namespace spindle::api {
namespace {

v1::Frame ping(std::uint64_t id) {
  v1::Frame frame;
  frame.set_id(id);
  frame.mutable_ping();
  return frame;
}

v1::Frame text_request(std::uint64_t id, std::size_t n_bytes) {
  v1::Frame frame;
  frame.set_id(id);
  frame.mutable_generate()->set_text(std::string(n_bytes, 'x'));
  return frame;
}

std::string encode(const v1::Frame& frame) {
  std::string bytes;
  EXPECT_TRUE(append_frame(frame, kDefaultMaxFrameBytes, bytes).ok());
  return bytes;
}

std::string with_length(std::uint32_t length, const std::string& body) {
  std::string bytes;
  for (unsigned i = 0; i < 4; ++i) {
    bytes.push_back(static_cast<char>(length >> (8 * i)));
  }
  return bytes + body;
}

std::string as_frame(const std::string& body) {
  return with_length(static_cast<std::uint32_t>(body.size()), body);
}

// The error of a decoder that got these bytes, OK when there is none.
Status decode_error(const std::string& bytes) {
  FrameDecoder decoder(kDefaultMaxFrameBytes);
  decoder.feed(bytes);
  for (;;) {
    const Result<std::optional<v1::Frame>> frame = decoder.next();
    if (!frame.ok()) return frame.status();
    if (!frame->has_value()) return ok_status();
  }
}

TEST(Framing, BytesOfASmallFrame) {
  // id = 7 (tag 0x08), ping (field 7, length-delimited: tag 0x3a) of length 0.
  EXPECT_EQ(encode(ping(7)), std::string("\x04\x00\x00\x00\x08\x07\x3a\x00", 8));
}

TEST(Framing, SplitAtEveryByte) {
  const std::string bytes = encode(ping(1)) + encode(text_request(2, 300)) + encode(ping(3));
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    FrameDecoder decoder(kDefaultMaxFrameBytes);
    std::vector<std::uint64_t> ids;
    for (const std::string& piece : {bytes.substr(0, cut), bytes.substr(cut)}) {
      decoder.feed(piece);
      for (;;) {
        Result<std::optional<v1::Frame>> frame = decoder.next();
        ASSERT_TRUE(frame.ok()) << frame.status().to_string();
        if (!frame->has_value()) break;
        ids.push_back((*frame)->id());
      }
    }
    EXPECT_EQ(ids, (std::vector<std::uint64_t>{1, 2, 3})) << "cut at " << cut;
    EXPECT_FALSE(decoder.holds_bytes());
  }
}

TEST(Framing, OneByteAtATime) {
  const std::string bytes = encode(text_request(5, 1000)) + encode(ping(6));
  FrameDecoder decoder(kDefaultMaxFrameBytes);
  int n_frames = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    decoder.feed({&bytes[i], 1});
    const Result<std::optional<v1::Frame>> frame = decoder.next();
    ASSERT_TRUE(frame.ok());
    n_frames += frame->has_value() ? 1 : 0;
    EXPECT_EQ(decoder.holds_bytes(), !frame->has_value());
  }
  EXPECT_EQ(n_frames, 2);
}

TEST(Framing, LimitIsExact) {
  const v1::Frame frame = text_request(1, 1000);
  const std::size_t n_bytes = frame.ByteSizeLong();
  std::string bytes;
  EXPECT_TRUE(append_frame(frame, n_bytes, bytes).ok());
  std::string none;
  EXPECT_EQ(append_frame(frame, n_bytes - 1, none).code(), StatusCode::kTooLarge);
  EXPECT_TRUE(none.empty());

  FrameDecoder fits(n_bytes);
  fits.feed(bytes);
  const Result<std::optional<v1::Frame>> whole = fits.next();
  EXPECT_TRUE(whole.ok() && whole->has_value());

  // The header alone is enough to be refused; the body never needs to arrive.
  FrameDecoder small(n_bytes - 1);
  small.feed(bytes.substr(0, 4));
  EXPECT_EQ(small.next().status().code(), StatusCode::kTooLarge);
}

TEST(Framing, LargestAnnouncedLengthIsRefused) {
  EXPECT_EQ(decode_error(with_length(0xFFFFFFFFU, "")).code(), StatusCode::kTooLarge);
  FrameDecoder unlimited(SIZE_MAX);
  unlimited.feed(with_length(0x80000000U, ""));
  EXPECT_EQ(unlimited.next().status().code(), StatusCode::kTooLarge);
}

TEST(Framing, TruncatedFrameIsHeldNotGuessed) {
  const std::string bytes = encode(text_request(1, 100));
  for (std::size_t n = 0; n < bytes.size(); ++n) {
    FrameDecoder decoder(kDefaultMaxFrameBytes);
    decoder.feed(bytes.substr(0, n));
    const Result<std::optional<v1::Frame>> frame = decoder.next();
    ASSERT_TRUE(frame.ok());
    EXPECT_FALSE(frame->has_value());
    EXPECT_EQ(decoder.holds_bytes(), n > 0);
  }
}

TEST(Framing, BodyCutShortIsMalformed) {
  const std::string body = text_request(1, 100).SerializeAsString();
  // Every proper prefix that ends inside a field is malformed; those at a field's end are frames.
  EXPECT_TRUE(decode_error(as_frame(body)).ok());
  EXPECT_EQ(decode_error(as_frame(body.substr(0, body.size() - 1))).code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(decode_error(as_frame(body.substr(0, 1))).code(), StatusCode::kInvalidArgument);
}

TEST(Framing, ErrorsAreForEver) {
  FrameDecoder decoder(kDefaultMaxFrameBytes);
  decoder.feed(as_frame("\xFF\xFF\xFF"));
  EXPECT_EQ(decoder.next().status().code(), StatusCode::kInvalidArgument);
  decoder.feed(encode(ping(1)));
  EXPECT_EQ(decoder.next().status().code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(decoder.holds_bytes());
}

TEST(Framing, InvalidUtf8IsMalformed) {
  EXPECT_EQ(decode_error(as_frame("\x08\x01\x1a\x04\x12\x02\xC3\x28")).code(),
            StatusCode::kInvalidArgument);
}

// Two bytes on the wire, a hundred in memory: the count is checked before anything is built.
TEST(Framing, TooManyElements) {
  v1::Frame frame;
  frame.set_id(1);
  v1::ChatPrompt& chat = *frame.mutable_generate()->mutable_chat();
  for (int i = 0; i < kMaxFrameElements - 2; ++i) chat.add_messages();
  EXPECT_TRUE(decode_error(encode(frame)).ok());
  chat.add_messages();
  EXPECT_EQ(decode_error(encode(frame)).code(), StatusCode::kInvalidArgument);

  // Unknown fields count too: field 100, varint 0.
  std::string unknown;
  for (int i = 0; i <= kMaxFrameElements; ++i) unknown += std::string("\xA0\x06\x00", 3);
  EXPECT_EQ(decode_error(as_frame(unknown)).code(), StatusCode::kInvalidArgument);
}

TEST(Framing, ManyTokenIdsAreNotElements) {
  v1::Frame frame;
  frame.set_id(1);
  for (int i = 0; i < 300'000; ++i) frame.mutable_generate()->mutable_tokens()->add_ids(i);
  EXPECT_TRUE(decode_error(encode(frame)).ok());
}

TEST(Framing, RandomBytesNeverCrash) {
  constexpr unsigned kSeed = 20240601;
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  std::mt19937 random(kSeed);
  int n_refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string body;
    if (round % 2 == 0) {
      body.resize(random() % 64);
      for (char& c : body) c = static_cast<char>(random());
    } else {  // a good frame with a few bytes changed
      body = text_request(random(), random() % 40).SerializeAsString();
      for (int i = 0; i < 3; ++i) body[random() % body.size()] = static_cast<char>(random());
    }
    const Status status = decode_error(as_frame(body));
    EXPECT_TRUE(status.ok() || status.code() == StatusCode::kInvalidArgument) << status.to_string();
    n_refused += status.ok() ? 0 : 1;
  }
  EXPECT_GT(n_refused, 500);
}

// proto/README.md shows this frame byte by byte.
TEST(Framing, FrameOfTheReadme) {
  v1::Frame frame;
  frame.set_id(1);
  v1::GenerateRequest& request = *frame.mutable_generate();
  request.set_text("Hi");
  request.mutable_sampling()->set_max_tokens(5);
  EXPECT_EQ(encode(frame),
            std::string("\x0c\x00\x00\x00\x08\x01\x1a\x08\x12\x02Hi\x2a\x02\x08\x05", 16));
}

}  // namespace
}  // namespace spindle::api
