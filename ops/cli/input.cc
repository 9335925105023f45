#include "ops/cli/input.h"

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>

namespace spindle::cli {
namespace {

// Length of the sequence at `i`, 0 if it is not one.
std::size_t utf8_length(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(text[k]); };
  const unsigned lead = byte(i);
  if (lead < 0x80) {
    return 1;
  }
  const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || i + length > text.size()) {
    return 0;
  }
  // The second byte's range excludes overlong forms, surrogates and what is beyond U+10FFFF.
  const unsigned low = lead == 0xE0 ? 0xA0U : lead == 0xF0 ? 0x90U : 0x80U;
  const unsigned high = lead == 0xED ? 0x9FU : lead == 0xF4 ? 0x8FU : 0xBFU;
  if (byte(i + 1) < low || byte(i + 1) > high) {
    return 0;
  }
  for (std::size_t k = i + 2; k < i + length; ++k) {
    if ((byte(k) & 0xC0U) != 0x80U) {
      return 0;
    }
  }
  return length;
}

Result<std::string> read_all(std::FILE* file, const std::string& name) {
  std::string text;
  std::array<char, 65536> bytes;
  while (const std::size_t n = std::fread(bytes.data(), 1, bytes.size(), file)) {
    text.append(bytes.data(), n);
    if (text.size() > kMaxInputBytes) {
      return too_large(name + " is too large: a request can carry " +
                       std::to_string(kMaxInputBytes) + " bytes of text");
    }
  }
  if (std::ferror(file) != 0) {
    return invalid_argument("cannot read " + name + ": " + std::strerror(errno));
  }
  if (Status status = check_utf8(text, name); !status.ok()) {
    return status;
  }
  return text;
}

}  // namespace

Status check_utf8(std::string_view text, const std::string& name) {
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = utf8_length(text, i);
    if (length == 0) {
      return invalid_argument(name + " is not UTF-8 text (at byte " + std::to_string(i) + ")");
    }
    i += length;
  }
  return ok_status();
}

Result<std::string> read_text_file(const std::string& path) {
  if (path == "-") {
    return read_standard_input();
  }
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::unique_ptr<std::FILE, Close> file(std::fopen(path.c_str(), "rbe"));
  if (!file) {
    return not_found("cannot open " + path + ": " + std::strerror(errno));
  }
  return read_all(file.get(), path);
}

Result<std::string> read_standard_input() { return read_all(stdin, "standard input"); }

}  // namespace spindle::cli
