#include "cluster/text/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace spindle::text {

bool is_trivially_nfc(std::string_view valid) {
  // The first combining character is U+0300, which starts with the byte 0xCC.
  return std::none_of(valid.begin(), valid.end(),
                      [](char c) { return static_cast<unsigned char>(c) >= 0xCC; });
}

Result<std::string> to_nfc(std::string_view valid) {
  if (is_trivially_nfc(valid)) return std::string(valid);
  utf8proc_uint8_t* raw = nullptr;
  const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
  const utf8proc_ssize_t n_bytes =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(valid.data()),
                   static_cast<utf8proc_ssize_t>(valid.size()), &raw, options);
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(raw, &std::free);
  if (n_bytes < 0) {
    return invalid_argument(std::string("NFC normalisation: ") + utf8proc_errmsg(n_bytes));
  }
  return std::string(reinterpret_cast<const char*>(raw), static_cast<std::size_t>(n_bytes));
}

}  // namespace spindle::text
