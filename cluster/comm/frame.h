#pragma once
// The wire form of a control message: a 32-byte header and the payload.
//
//   offset  bytes  field
//        0      4  magic "SPDL"      a foreign sender, or one of another byte order
//        4      2  version
//        6      2  channel
//        8      4  epoch             a message of an earlier incarnation of the cluster
//       12      4  source rank
//       16      8  payload length
//       24      8  XXH3 64 of the payload, seeded with the XXH3 64 of bytes 0..23
//
// Integers are in the machine's own order: all ranks run the same build.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "cluster/comm/channel.h"
#include "cluster/comm/message.h"
#include "kernels/core/status.h"

namespace spindle::comm {

inline constexpr std::size_t kFrameHeaderBytes = 32;

// HostGroup's collectives put this much of their own before the caller's payload.
inline constexpr std::size_t kCollectiveHeaderBytes = 16;

inline constexpr std::size_t kMaxFrameBytes =
    kFrameHeaderBytes + kCollectiveHeaderBytes + kMaxMessageBytes;

struct FrameOrigin {
  Channel channel = Channel::kBootstrap;
  std::uint32_t epoch = 0;
  int source = 0;
};

// `payload` is given in two parts so that a collective's header needs no extra copy.
std::string encode_frame(const FrameOrigin& origin, std::string_view head, std::string_view body);

// Checks every field and the hash, then leaves only the payload in `frame`. INTERNAL names what is
// wrong; `frame` is unspecified then.
Status decode_frame(const FrameOrigin& expected, std::string& frame);

// XXH3 64 of `bytes`.
std::uint64_t hash_bytes(std::string_view bytes);

}  // namespace spindle::comm
