#pragma once
// Which level a stage needs for a number of requests to run together: the least error whose bytes
// fit, found by a price on bytes. Pure functions.
//
// A stage's levels minimise error(l) + price * bytes(l). The price rises from 0 until the stage's
// projection fits (dual ascent). As every stage has memory of its own, so is its price, and as
// there are few levels, the ascent goes straight from one price at which the choice changes to the
// next: at most one step for each level, and exact. A price reaches the levels on the lower convex
// hull of (bytes, error) alone; where a lighter one off the hull fits too, it is the better answer
// to the constraint and is taken.

#include <span>
#include <vector>

namespace spindle::coordinator {

// One stage, with requests of the length that is expected. bytes never rise, error never falls.
struct StageLoad {
  std::vector<double> bytes =
      {};  // [n_levels], of one compressed request, above 0, light to strong
  std::vector<double> error = {};  // [n_levels]
  double capacity = 0;             // bytes
  double unfilled = 0;             // of them free on average where the stage limits; for the caller
  double peak = 0;                 // bytes of those in their prefill, uncompressed
  double n_at_peak = 1;            // how many these are, above 0
};

// How many requests run together at a level, n_at_peak of them in their prefill:
// (n - n_at_peak) * bytes + max(peak, n_at_peak * bytes) <= capacity. Below n_at_peak when not even
// those fit. A fraction counts, so that small changes show.
double requests_that_fit(const StageLoad& stage, int level);

// What n_requests take together at a level.
double bytes_of_requests(const StageLoad& stage, int level, double n_requests);

struct LevelChoice {
  int level = 0;
  double price = 0;   // error for a byte at which the stage came to fit; 0: memory does not bind
  bool fits = false;  // else the strongest level does not either
};
// Among the levels from `lightest` on.
LevelChoice choose_level(const StageLoad& stage, int lightest, double n_requests);

}  // namespace spindle::coordinator
