#pragma once
// Frames on the wire: 4 bytes little-endian length, then that many bytes of one
// spindle.api.v1.Frame. Used by both sides; proto/README.md shows the bytes.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/core/status.h"
#include "proto/api.pb.h"

namespace spindle::api {

inline constexpr std::uint32_t kProtocolMajor = 1;
inline constexpr std::uint32_t kProtocolMinor = 3;

inline constexpr std::size_t kFrameHeaderBytes = 4;
// Of the Frame, without its header.
inline constexpr std::size_t kDefaultMaxFrameBytes = 16U << 20U;
// Strings, sub-messages and unknown fields in one frame. Each costs the receiver tens of bytes of
// memory for as little as two on the wire, so they are counted before anything is parsed.
inline constexpr std::int64_t kMaxFrameElements = 100'000;

// Appends the header and the frame to `out`. TOO_LARGE, and `out` unchanged, when the frame is
// larger than `max_frame_bytes`.
Status append_frame(const v1::Frame& frame, std::size_t max_frame_bytes, std::string& out);

// Turns received bytes into frames, however the bytes were cut into pieces.
//
// The announced length is checked against the limit as soon as the header is there, and memory
// grows with the bytes that really arrived, never with the announced length. After an error the
// stream cannot be resynchronised: every later call returns the same error.
//
// Thread-safety: none; one connection's reader owns it.
class FrameDecoder {
 public:
  explicit FrameDecoder(std::size_t max_frame_bytes) : max_frame_bytes_(max_frame_bytes) {}

  // Takes effect with the next frame header that is looked at.
  void set_max_frame_bytes(std::size_t max_frame_bytes) { max_frame_bytes_ = max_frame_bytes; }

  // Adds received bytes. Frames in them are taken out with next().
  void feed(std::string_view bytes);

  // The next complete frame, or nothing while more bytes are needed. TOO_LARGE for a length over
  // the limit, INVALID_ARGUMENT for bytes that are not a Frame.
  Result<std::optional<v1::Frame>> next();

  // Bytes are held that next() has not used: after next() returned nothing, a part of a frame.
  bool holds_bytes() const { return consumed_ < buffer_.size(); }

 private:
  Status fail(Status error);

  std::size_t max_frame_bytes_;
  std::string buffer_;
  std::size_t consumed_ = 0;  // bytes at the front of buffer_ that were used
  Status error_;
};

}  // namespace spindle::api
