#pragma once
// What `spindle eval` measures on: records of a JSON Lines file and prose, gzipped or plain.
//
// A record is one conversation about a document, {"task", "tokens", "messages": [user, assistant,
// ...]}, whose first user message is the document, an empty line, and the first question; or prose
// without questions, {"task", "tokens", "text"}.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::cli {

inline constexpr std::size_t kMaxEvalBytes = std::size_t{256} << 20;  // of a file, decompressed

struct EvalMessage {
  std::string role;
  std::string content;
};

struct EvalRecord {
  int index = 0;  // of its line in the file, from 0
  std::string task;
  std::int64_t n_tokens = 0;          // as the file says
  std::vector<EvalMessage> messages;  // empty for prose
  std::size_t document_bytes = 0;     // of the first message
  std::string text;                   // prose

  bool is_prose() const { return messages.empty(); }
};

// A whole file; one that is not gzipped as it is. NOT_FOUND, TOO_LARGE, INVALID_ARGUMENT.
Result<std::string> read_gzip(const std::string& path);
std::uint32_t checksum(std::string_view bytes);  // CRC-32

Result<EvalRecord> parse_record(std::string_view line, int index);
// Errors name the line, from 1.
Result<std::vector<EvalRecord>> parse_records(std::string_view text);

// "2k", "4k" or "7.8k": the nearest by ratio.
std::string length_bucket(std::int64_t n_tokens);

// `limit` of the records (0: all), as evenly as possible over lengths and tasks and within each
// group, in the file's order.
std::vector<EvalRecord> spread_records(std::vector<EvalRecord> records, std::size_t limit);

}  // namespace spindle::cli
