#pragma once
// Reads the "pre_tokenizer" of a tokenizer.json.

#include "cluster/text/json_fields.h"
#include "cluster/text/pre_tokenizer.h"
#include "kernels/core/status.h"

namespace spindle::text {

// Supported: Split, Digits, and one ByteLevel as the last step, alone or in a Sequence.
Result<PreTokenizer> read_pre_tokenizer(const JsonFields& root);

}  // namespace spindle::text
