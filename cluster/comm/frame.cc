#include "cluster/comm/frame.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cstring>

namespace spindle::comm {
namespace {

constexpr std::uint32_t kMagic = 0x4c445053;  // "SPDL"
constexpr std::uint16_t kVersion = 1;

struct Header {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t channel;
  std::uint32_t epoch;
  std::uint32_t source;
  std::uint64_t length;
  std::uint64_t hash;
};
static_assert(sizeof(Header) == kFrameHeaderBytes);

std::uint64_t frame_hash(const Header& header, std::string_view payload) {
  const std::uint64_t seed = XXH3_64bits(&header, offsetof(Header, hash));
  return XXH3_64bits_withSeed(payload.data(), payload.size(), seed);
}

Status bad_frame(int source, const std::string& what) {
  return internal_error("bad frame from rank " + std::to_string(source) + ": " + what);
}

}  // namespace

std::uint64_t hash_bytes(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string encode_frame(const FrameOrigin& origin, std::string_view head, std::string_view body) {
  Header header{.magic = kMagic,
                .version = kVersion,
                .channel = static_cast<std::uint16_t>(origin.channel),
                .epoch = origin.epoch,
                .source = static_cast<std::uint32_t>(origin.source),
                .length = head.size() + body.size(),
                .hash = 0};
  std::string frame;
  frame.reserve(kFrameHeaderBytes + head.size() + body.size());
  frame.append(kFrameHeaderBytes, '\0').append(head).append(body);
  header.hash = frame_hash(header, std::string_view(frame).substr(kFrameHeaderBytes));
  std::memcpy(frame.data(), &header, sizeof header);
  return frame;
}

Status decode_frame(const FrameOrigin& expected, std::string& frame) {
  if (frame.size() < kFrameHeaderBytes) {
    return bad_frame(expected.source,
                     std::to_string(frame.size()) + " bytes are shorter than the header");
  }
  Header header;
  std::memcpy(&header, frame.data(), sizeof header);
  const std::string_view payload = std::string_view(frame).substr(kFrameHeaderBytes);
  if (header.magic != kMagic) return bad_frame(expected.source, "not a Spindle frame");
  if (header.version != kVersion) {
    return bad_frame(expected.source, "version " + std::to_string(header.version) + ", this is " +
                                          std::to_string(kVersion));
  }
  if (header.channel != static_cast<std::uint16_t>(expected.channel)) {
    return bad_frame(expected.source, "channel " + std::to_string(header.channel) + " on the " +
                                          std::string(channel_name(expected.channel)) + " channel");
  }
  if (header.epoch != expected.epoch) {
    return bad_frame(expected.source, "epoch " + std::to_string(header.epoch) + ", this is " +
                                          std::to_string(expected.epoch));
  }
  if (header.source != static_cast<std::uint32_t>(expected.source)) {
    return bad_frame(expected.source, "it claims rank " + std::to_string(header.source));
  }
  if (header.length != payload.size()) {
    return bad_frame(expected.source, "length " + std::to_string(header.length) + ", but " +
                                          std::to_string(payload.size()) + " bytes came");
  }
  if (header.hash != frame_hash(header, payload)) {
    return bad_frame(expected.source, "checksum mismatch");
  }
  frame.erase(0, kFrameHeaderBytes);
  return {};
}

}  // namespace spindle::comm
