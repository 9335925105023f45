#pragma once
// A quality report from the rows that `spindle eval` wrote, and from nothing else, so that it can
// be written again at any time.

#include <boost/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::cli {

// The rows of a JSON file that `spindle eval` wrote. INVALID_ARGUMENT for anything else.
Result<boost::json::array> parse_rows(std::string_view text);

// A plot's file name and SVG text.
using Plot = std::pair<std::string, std::string>;
// Quality over bytes for each regime, perplexity over bytes, and the bytes of each layer; only what
// the rows have figures for.
std::vector<Plot> report_plots(const boost::json::array& rows);

// Markdown; `plots` are shown where the report's file finds them.
std::string report_text(const boost::json::array& rows, const std::vector<std::string>& plots);

}  // namespace spindle::cli
