#pragma once
// Reads the Prometheus text format strictly: what the tests of /metrics look at.

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace spindle::telemetry::testing {

struct Family {
  std::string type;
  std::string help;
  // By labels as written, of the family's own name or with a histogram's suffix before them:
  // "{a=\"b\"}", "_bucket{le=\"1\"}".
  std::map<std::string, double> samples;
};

// By name. Throws std::runtime_error, with the line, for text that is not the format 0.0.4: samples
// before their TYPE or of another family, two families or samples of one name, bad names, no HELP.
inline std::map<std::string, Family> parse_exposition(const std::string& text) {
  std::map<std::string, Family> families;
  std::string current;
  const auto fail = [](const std::string& why, const std::string& line) {
    throw std::runtime_error(why + ": " + line);
  };
  const auto is_name = [](const std::string& name) {
    return !name.empty() && name.find_first_not_of(
                                "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU"
                                "VWXYZ0123456789_:") == std::string::npos;
  };
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) fail("no line end", text.substr(begin));
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    if (line.starts_with("# HELP ") || line.starts_with("# TYPE ")) {
      const bool is_help = line[2] == 'H';
      const std::size_t space = line.find(' ', 7);
      if (space == std::string::npos) fail("no text", line);
      const std::string name = line.substr(7, space - 7);
      if (!is_name(name)) fail("bad name", line);
      Family& family = families[name];
      std::string& field = is_help ? family.help : family.type;
      if (!field.empty()) fail("twice", line);
      field = line.substr(space + 1);
      current = name;
      continue;
    }
    const std::size_t value_at = line.rfind(' ');
    if (value_at == std::string::npos) fail("no value", line);
    const std::string sample = line.substr(0, value_at);
    if (current.empty() || !sample.starts_with(current)) fail("sample of no family", line);
    Family& family = families.at(current);
    if (family.type.empty() || family.help.empty()) fail("sample before HELP and TYPE", line);
    const std::string key = sample.substr(current.size());
    const std::string suffix = key.substr(0, key.find('{'));
    const bool is_histogram = family.type == "histogram";
    if (is_histogram != (suffix == "_bucket" || suffix == "_sum" || suffix == "_count")) {
      fail("sample of another type", line);
    }
    std::size_t used = 0;
    const double value = std::stod(line.substr(value_at + 1), &used);
    if (used != line.size() - value_at - 1) fail("bad value", line);
    if (!family.samples.emplace(key, value).second) fail("sample twice", line);
  }
  return families;
}

}  // namespace spindle::telemetry::testing
