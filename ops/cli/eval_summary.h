#pragma once
// From the results of single probes to the rows of the report.

#include <boost/json.hpp>
#include <string>
#include <vector>

#include "ops/cli/eval_cells.h"
#include "ops/cli/eval_journal.h"

namespace spindle::cli {

// One probe: a record in a regime, or a window of prose.
struct EvalItem {
  std::string key;  // of its results
  Regime regime = Regime::kQa;
  std::string task;    // of a record
  std::string length;  // "2k"; of prose the prefix in tokens
};

// A group of one task and length counts in the macro average only where the uncompressed cache
// answers this share of it; elsewhere a method's accuracy says little about what it lost.
inline constexpr double kCountsFrom = 0.95;

// One row for each regime (qa, qw) that items have, and cell; README.md lists the fields. Items
// without a result are left out. `common` goes into every row.
boost::json::array summarise(const std::vector<EvalItem>& items, const std::vector<Cell>& cells,
                             const Results& results, const boost::json::object& common);

// JSON with one line for each member of a row, and numbers as people write them.
std::string rows_text(const boost::json::array& rows);

}  // namespace spindle::cli
