#pragma once
// The golden reference data and the bundled model, as tests of this folder need them.

#include <boost/json.hpp>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "tests/source_dir.h"

namespace spindle::text {

inline std::filesystem::path bundled_model() {
  return std::filesystem::path(source_dir()) / "models" / "spindle-mini";
}

inline std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

inline boost::json::object golden_data() {
  return boost::json::parse(
             read_text(std::filesystem::path(source_dir()) / "tests" / "golden" / "golden.json"))
      .as_object();
}

}  // namespace spindle::text
