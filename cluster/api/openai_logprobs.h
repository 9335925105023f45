#pragma once
// The two shapes in which OpenAI's endpoints report log-probabilities.

#include <cstdint>
#include <string>
#include <vector>

#include "cluster/api/completion.h"

namespace spindle::api {

// {"content":[{"token","logprob","bytes","top_logprobs":[...]}],"refusal":null}
void append_chat_logprobs(std::string& out, const std::vector<OutputTokenInfo>& tokens);

// {"tokens":[],"token_logprobs":[],"top_logprobs":[{}],"text_offset":[]}. `text_offset` is where
// the first token starts in the choice's text, in code points, and is moved past the last one.
// Tokens that are not whole characters are written as "bytes:\xe2\x82", so that the keys of
// top_logprobs differ.
void append_completion_logprobs(std::string& out, const std::vector<OutputTokenInfo>& tokens,
                                std::int64_t& text_offset);

}  // namespace spindle::api
