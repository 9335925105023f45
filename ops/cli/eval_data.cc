#include "ops/cli/eval_data.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <boost/json.hpp>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "ops/cli/input.h"

namespace spindle::cli {
namespace {

namespace json = boost::json;

Result<std::string> text_field(const json::object& object, const char* name) {
  const json::value* value = object.if_contains(name);
  if (value == nullptr || !value->is_string()) {
    return invalid_argument(std::string("\"") + name + "\" must be a text");
  }
  return std::string(value->as_string());
}

Status read_messages(const json::value& value, std::vector<EvalMessage>& messages) {
  if (!value.is_array() || value.as_array().empty() || value.as_array().size() % 2 != 0) {
    return invalid_argument("\"messages\" must be pairs of a question and its answer");
  }
  for (const json::value& entry : value.as_array()) {
    if (!entry.is_object()) return invalid_argument("\"messages\" must hold objects");
    const Result<std::string> role = text_field(entry.as_object(), "role");
    const Result<std::string> content = text_field(entry.as_object(), "content");
    if (!role.ok()) return role.status();
    if (!content.ok()) return content.status();
    if (*role != (messages.size() % 2 == 0 ? "user" : "assistant")) {
      return invalid_argument("\"messages\" must be of user and assistant in turn");
    }
    messages.push_back({*role, *content});
  }
  return ok_status();
}

}  // namespace

Result<std::string> read_gzip(const std::string& path) {
  struct Close {
    void operator()(gzFile_s* file) const { gzclose(file); }
  };
  errno = 0;
  const std::unique_ptr<gzFile_s, Close> file(gzopen(path.c_str(), "rbe"));
  if (!file) return not_found("cannot open " + path + ": " + std::strerror(errno));
  std::string text;
  std::array<char, 65536> bytes;
  for (;;) {
    const int n = gzread(file.get(), bytes.data(), bytes.size());
    if (n < 0) {
      int code = 0;
      const std::string why = gzerror(file.get(), &code);
      return invalid_argument("cannot read " + path + ": " +
                              (code == Z_ERRNO ? std::strerror(errno) : why));
    }
    if (n == 0) break;
    text.append(bytes.data(), static_cast<std::size_t>(n));
    if (text.size() > kMaxEvalBytes) {
      return too_large(path + " has more than " + std::to_string(kMaxEvalBytes) + " bytes");
    }
  }
  // A file that was cut reads as a short one otherwise.
  int code = Z_OK;
  gzerror(file.get(), &code);
  if (code != Z_OK) return invalid_argument(path + " ends in the middle");
  if (Status status = check_utf8(text, path); !status.ok()) return status;
  return text;
}

std::uint32_t checksum(std::string_view bytes) {
  return static_cast<std::uint32_t>(
      crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

Result<EvalRecord> parse_record(std::string_view line, int index) {
  boost::system::error_code error;
  const json::value value = json::parse({line.data(), line.size()}, error);
  if (error || !value.is_object()) return invalid_argument("not a JSON object");
  const json::object& object = value.as_object();
  EvalRecord record;
  record.index = index;
  const Result<std::string> task = text_field(object, "task");
  if (!task.ok()) return task.status();
  record.task = *task;
  const json::value* tokens = object.if_contains("tokens");
  if (tokens == nullptr || !tokens->is_int64() || tokens->as_int64() < 1) {
    return invalid_argument("\"tokens\" must be a count");
  }
  record.n_tokens = tokens->as_int64();
  const json::value* messages = object.if_contains("messages");
  if (messages == nullptr) {
    Result<std::string> text = text_field(object, "text");
    if (!text.ok()) return invalid_argument("neither \"messages\" nor \"text\"");
    record.text = *std::move(text);
    return record;
  }
  if (Status status = read_messages(*messages, record.messages); !status.ok()) return status;
  record.document_bytes = record.messages[0].content.rfind("\n\n");
  if (record.document_bytes == std::string::npos || record.document_bytes == 0) {
    return invalid_argument("the first message must be a document, an empty line and a question");
  }
  return record;
}

Result<std::vector<EvalRecord>> parse_records(std::string_view text) {
  std::vector<EvalRecord> records;
  for (int index = 0; !text.empty(); ++index) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    if (end > 0) {
      Result<EvalRecord> record = parse_record(text.substr(0, end), index);
      if (!record.ok()) {
        return record.status().with_context("line " + std::to_string(index + 1));
      }
      records.push_back(*std::move(record));
    }
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  if (records.empty()) return invalid_argument("no records");
  return records;
}

std::string length_bucket(std::int64_t n_tokens) {
  constexpr std::array<std::pair<double, const char*>, 3> kBuckets{
      {{2000, "2k"}, {4000, "4k"}, {7800, "7.8k"}}};
  const double tokens = std::max(1.0, static_cast<double>(n_tokens));
  const auto distance = [tokens](const auto& b) { return std::abs(std::log(tokens / b.first)); };
  return std::min_element(kBuckets.begin(), kBuckets.end(),
                          [&](const auto& a, const auto& b) { return distance(a) < distance(b); })
      ->second;
}

std::vector<EvalRecord> spread_records(std::vector<EvalRecord> records, std::size_t limit) {
  if (limit == 0 || limit >= records.size()) return records;
  // By length first: every 15th of an even grid, say, then meets each task and each length.
  std::map<std::pair<std::string, std::string>, std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < records.size(); ++i) {
    groups[{length_bucket(records[i].n_tokens), records[i].task}].push_back(i);
  }
  std::vector<std::size_t> quotas(groups.size(), 0);
  for (std::size_t left = limit; left > 0;) {
    // What small groups cannot give goes to the others in the next round.
    std::vector<std::size_t> open;
    std::size_t g = 0;
    for (const auto& [name, members] : groups) {
      if (quotas[g] < members.size()) open.push_back(g);
      ++g;
    }
    const std::size_t round = std::min(left, open.size());
    for (std::size_t i = 0; i < round; ++i) ++quotas[open[i * open.size() / round]];
    left -= round;
  }
  std::vector<std::size_t> chosen;
  std::size_t g = 0;
  for (const auto& [name, members] : groups) {
    for (std::size_t i = 0; i < quotas[g]; ++i) {
      chosen.push_back(members[i * members.size() / quotas[g]]);
    }
    ++g;
  }
  std::sort(chosen.begin(), chosen.end());
  std::vector<EvalRecord> out;
  for (const std::size_t i : chosen) out.push_back(std::move(records[i]));
  return out;
}

}  // namespace spindle::cli
