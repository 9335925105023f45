#pragma once
// What a recording is made of.

#include <cstdint>

namespace spindle::worker {

// Slices of a rank's stage thread follow each other without a gap; the other kinds are moments of
// rank 0. What a, b and c say is beside each kind; a step's tokens are those of its prompts and
// those that it decodes.
enum class TraceKind : std::uint8_t {
  kIdle,         // waits for a plan
  kAwaitBudget,  // waits for the budget plan that the step needs
  kPrepare,      // sequences come, grow and go; a: how many
  kCompress,     // boundaries; a: sequences
  kAwaitStage,   // waits for the activations of the stage before
  kReceive,      // takes them over; c: bytes
  kForward,      // a: prompt tokens, b: decoded tokens
  kSample,       // a: prompt tokens, b: decoded tokens
  kAwaitRoom,    // waits until the stage after has room
  kSend,         // hands activations on; c: bytes
  kScore,        // prompts that reached a boundary; a: how many
  kReport,  // the result to rank 0; a, b, c: busy, compression and bubble of the stage clock, in us
  // Rank 0's scheduler.
  kPlan,        // a step was planned; a: prompt tokens, b: decoded tokens, c: runs
  kPreempt,     // a: requests
  kBudgetMove,  // a: stage, b and c: its ratio before and after, in millionths
  // Values from now on.
  kRequests,  // a: running, b: waiting
  kKvUsed,    // a: bytes
};

inline constexpr int kTraceKinds = 17;

// Times are nanoseconds of the steady clock of the rank that recorded it.
struct TraceRecord {
  TraceKind kind = TraceKind::kIdle;
  std::uint64_t step = 0;  // 0: of none
  std::int64_t begin_ns = 0;
  std::int64_t duration_ns = 0;  // 0: a moment
  std::int64_t a = 0;
  std::int64_t b = 0;
  std::int64_t c = 0;

  bool operator==(const TraceRecord&) const = default;
};

}  // namespace spindle::worker
