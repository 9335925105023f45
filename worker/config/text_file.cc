#include "worker/config/text_file.h"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/text_format.h>

#include <fstream>
#include <system_error>

namespace spindle::config {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxDepth = 16;

// Keeps the first error: the ones after it are often its consequences.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    if (found_) return;
    found_ = true;
    line_ = line;
    column_ = column;
    message_ = message;
  }

  // The parser has often read past a name when it finds it unknown, and reports the place of the
  // token after it, which may be a line below. Moves the error back to the name.
  void point_at_the_name(std::string_view text) {
    google::protobuf::io::ArrayInputStream input(text.data(), static_cast<int>(text.size()));
    FirstError ignored;
    google::protobuf::io::Tokenizer tokenizer(&input, &ignored);
    tokenizer.set_comment_style(google::protobuf::io::Tokenizer::SH_COMMENT_STYLE);
    bool more = true;
    while (more) {
      more = tokenizer.Next();
      const auto& token = tokenizer.current();
      if (token.line != line_ || token.column != column_) continue;
      const auto& before = tokenizer.previous();
      if (!before.text.empty() && message_.find('"' + before.text + '"') != std::string::npos) {
        line_ = before.line;
        column_ = before.column;
      }
      return;
    }
  }

  // "NAME:LINE:COLUMN: message"; protobuf counts from 0, editors from 1.
  std::string describe(std::string_view name) const {
    std::string text(name);
    if (found_ && line_ >= 0) {
      text += ':' + std::to_string(line_ + 1) + ':' + std::to_string(column_ + 1);
    }
    return text + ": " + (found_ ? message_ : "not in protobuf text format");
  }

 private:
  bool found_ = false;
  int line_ = 0;
  int column_ = 0;
  std::string message_;
};

Status larger_than(std::string_view name, std::size_t max_bytes) {
  return too_large(std::string(name) + ": larger than " + std::to_string(max_bytes) + " bytes");
}

}  // namespace

Result<std::string> read_text_file(const fs::path& path, std::size_t max_bytes) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found) return not_found(path.string() + ": no such file");
  if (error) return invalid_argument(path.string() + ": " + error.message());
  if (fs::is_directory(status)) {
    return invalid_argument(path.string() + ": is a directory, not a configuration file");
  }
  // A pipe or a device could block or never end.
  if (!fs::is_regular_file(status)) {
    return invalid_argument(path.string() + ": not a regular file");
  }
  std::ifstream file(path, std::ios::binary);
  std::string text(max_bytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file.is_open() || file.bad()) return invalid_argument(path.string() + ": cannot be read");
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > max_bytes) return larger_than(path.string(), max_bytes);
  return text;
}

Status parse_text(std::string_view text, std::string_view name, std::size_t max_bytes,
                  google::protobuf::Message& message) {
  if (text.size() > max_bytes) return larger_than(name, max_bytes);
  FirstError error;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&error);
  parser.SetRecursionLimit(kMaxDepth);
  google::protobuf::io::ArrayInputStream input(text.data(), static_cast<int>(text.size()));
  if (parser.Parse(&input, &message)) return ok_status();
  error.point_at_the_name(text);
  return invalid_argument(error.describe(name));
}

}  // namespace spindle::config
