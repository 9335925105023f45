#pragma once
// Bugs to put into a run on purpose, to show that its checks find them.

#include <array>
#include <cstdint>
#include <string_view>

namespace spindle::coordinator::simulation {

enum class Fault : std::uint8_t {
  kNone,
  kLeakedPage,        // a stage keeps a page of a sequence that it frees
  kLargeReservation,  // a stage reserves a page more than it was told
  kLostFree,          // a stage does not report what it freed
  kLostScores,        // a stage does not report a boundary
  kLowReport,         // a stage reports that a boundary left no pages
  kWrongToken,        // the last stage samples another token
  kTokenTwice,        // the last stage reports a token twice
  kResultTwice,       // a result arrives twice
  kPlansSwapped,      // two plans change places on their way to a stage
  kLongerRun,         // a run has one token more than it should when it reaches the stages
  kRepeatedEnd,       // a request ends twice
  kEarlyBudget,       // a step is planned by budgets that are not in effect yet
};

struct FaultName {
  Fault fault;
  std::string_view name;
};
inline constexpr std::array kFaults{
    FaultName{Fault::kLeakedPage, "leaked-page"},
    FaultName{Fault::kLargeReservation, "large-reservation"},
    FaultName{Fault::kLostFree, "lost-free"},
    FaultName{Fault::kLostScores, "lost-scores"},
    FaultName{Fault::kLowReport, "low-report"},
    FaultName{Fault::kWrongToken, "wrong-token"},
    FaultName{Fault::kTokenTwice, "token-twice"},
    FaultName{Fault::kResultTwice, "result-twice"},
    FaultName{Fault::kPlansSwapped, "plans-swapped"},
    FaultName{Fault::kLongerRun, "longer-run"},
    FaultName{Fault::kRepeatedEnd, "repeated-end"},
    FaultName{Fault::kEarlyBudget, "early-budget"},
};

// A fault that happens once, at the first chance from a step on.
class FaultInjector {
 public:
  FaultInjector() = default;
  FaultInjector(Fault fault, std::uint64_t from_step) : fault_(fault), from_step_(from_step) {}

  bool strikes(Fault fault, std::uint64_t step) {
    if (has_struck_ || fault != fault_ || step < from_step_) return false;
    return has_struck_ = true;
  }
  bool has_struck() const { return has_struck_; }

 private:
  Fault fault_ = Fault::kNone;
  std::uint64_t from_step_ = 0;
  bool has_struck_ = false;
};

}  // namespace spindle::coordinator::simulation
