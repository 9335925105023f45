#pragma once
// Where a stage's time goes: the time line of what computes for it, cut by marks into intervals
// that each have one cause. On the CPU that is the stage thread's own time; on a GPU that of the
// compute stream, which the thread runs ahead of.

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace spindle::worker {

enum class StageTime : std::uint8_t {
  kEmpty,       // waiting for a step plan
  kUpstream,    // waiting for activations, and taking them over
  kDownstream,  // handing activations on, and waiting until the next stage has room for them
  kBusy,        // computing
  kCompress,    // scoring and carrying out boundaries
  kOther,       // book-keeping
};
inline constexpr std::size_t kStageTimes = 6;

struct StageTimes {
  std::array<std::uint64_t, kStageTimes> us = {};
  std::uint64_t& operator[](StageTime what) { return us[static_cast<std::size_t>(what)]; }
  std::uint64_t operator[](StageTime what) const { return us[static_cast<std::size_t>(what)]; }
};

// Thread-safety: none; the stage's thread.
class StageClock {
 public:
  virtual ~StageClock() = default;
  StageClock(const StageClock&) = delete;
  StageClock& operator=(const StageClock&) = delete;

  // The time since the last mark went into `what`, but for up to exclude_us of it, which count
  // nowhere. The first mark only begins.
  virtual void mark(StageTime what, std::uint64_t exclude_us = 0) = 0;
  // What has become known since the last take(); on a GPU intervals that are over by now.
  virtual StageTimes take() = 0;

 protected:
  StageClock() = default;
};

class HostStageClock final : public StageClock {
 public:
  void mark(StageTime what, std::uint64_t exclude_us = 0) override;
  StageTimes take() override;

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_;
  std::array<std::int64_t, kStageTimes> ns_ = {};
};

}  // namespace spindle::worker
