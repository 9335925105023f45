#pragma once
// Names and values that came out of a file, made safe to put into an error message or a log line.

#include <string>
#include <string_view>

namespace spindle::model {

// In double quotes; bytes outside printable ASCII become \xNN and long text is cut with "...".
std::string in_quotes(std::string_view text);

// `text` (already printable) cut to a length fit for one line.
std::string shortened(std::string text);

}  // namespace spindle::model
