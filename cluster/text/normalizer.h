#pragma once
// Unicode normalisation of text before it is tokenised.

#include <string>
#include <string_view>

#include "kernels/core/status.h"

namespace spindle::text {

// True if NFC cannot change `valid`, found without normalising it (only plain Latin-1 and below).
bool is_trivially_nfc(std::string_view valid);

// The canonical composition of valid UTF-8.
Result<std::string> to_nfc(std::string_view valid);

}  // namespace spindle::text
