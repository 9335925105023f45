#pragma once
// Where the sources are. A function instead of a macro, so that a compiler cache serves the tests
// of another checkout too.

#include <string>

namespace spindle {

const std::string& source_dir();

}  // namespace spindle
