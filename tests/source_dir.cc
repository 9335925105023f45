#include "tests/source_dir.h"

namespace spindle {

const std::string& source_dir() {
  static const std::string dir = SPINDLE_SOURCE_DIR;
  return dir;
}

}  // namespace spindle
