#pragma once
// Checks of a client's numbers that read as a table.

#include <fmt/format.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cluster/api/request_validation.h"

namespace spindle::api {

// Keeps the first range error and ignores what follows.
class RangeCheck {
 public:
  // low <= value <= high, or low < value when `open_low`. NaN is never in a range.
  void real(const std::string& name, double value, double low, double high, bool open_low = false) {
    if (error_) return;
    const bool above = open_low ? value > low : value >= low;
    if (above && value <= high) return;
    error_ = invalid_field(name, fmt::format("{} must be in {}{:g}, {:g}], got {:g}", name,
                                             open_low ? '(' : '[', low, high, value));
  }
  void integer(const std::string& name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (error_ || (value >= low && value <= high)) return;
    error_ = invalid_field(
        name, fmt::format("{} must be between {} and {}, got {}", name, low, high, value));
  }
  void fail(const std::string& name, std::string message) {
    if (!error_) error_ = invalid_field(name, std::move(message));
  }
  bool ok() const { return !error_.has_value(); }
  std::optional<ApiError> take() { return std::move(error_); }

 private:
  std::optional<ApiError> error_;
};

}  // namespace spindle::api
