#pragma once
// A received message, and the limits every body of HostGroup keeps.

#include <cstddef>
#include <string>

namespace spindle::comm {

struct Message {
  int source = 0;
  std::string bytes;
};

// As a source: whichever rank's message arrived first.
inline constexpr int kAnySource = -1;

// Largest payload of one control message. The sender refuses more before it copies, the receiver
// before it allocates.
inline constexpr std::size_t kMaxMessageBytes = std::size_t{64} << 20;

// What one rank may have sent on one channel without it having been taken by the other side. A
// message is always accepted when nothing else is waiting, so this is no limit on its size.
inline constexpr std::size_t kMaxUnreceivedBytes = std::size_t{128} << 20;

}  // namespace spindle::comm
