#include "ops/cli/eval_journal.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace spindle::cli {
namespace {

namespace json = boost::json;

template <typename T>
json::array to_array(const std::vector<T>& values) {
  return json::array(values.begin(), values.end());
}

Status system_error(const std::string& what, const std::string& path) {
  return invalid_argument(what + " " + path + ": " + std::strerror(errno));
}

}  // namespace

json::object to_json(const ResultKey& key, const CellResult& result) {
  json::object line{{"item", key.first}, {"cell", key.second}};
  if (!result.refused.empty()) {
    line["refused"] = result.refused;
    return line;
  }
  line["right"] = to_array(result.right);
  line["kl"] = to_array(result.kl);
  line["nll"] = result.nll;
  line["n_tokens"] = result.n_tokens;
  line["full_bytes"] = result.full_bytes;
  line["kept_bytes"] = result.kept_bytes;
  line["compress_ms"] = result.compress_ms;
  line["compressed_tokens"] = result.compressed_tokens;
  line["layer_bytes"] = to_array(result.layer_bytes);
  line["k_entries"] = result.k_entries;
  line["v_entries"] = result.v_entries;
  return line;
}

Result<std::pair<ResultKey, CellResult>> parse_result(const json::value& line) {
  // at() and value_to() throw for anything that to_json does not write.
  try {
    const json::object& object = line.as_object();
    std::pair<ResultKey, CellResult> out;
    out.first = {json::value_to<std::string>(object.at("item")),
                 json::value_to<std::string>(object.at("cell"))};
    CellResult& result = out.second;
    if (const json::value* refused = object.if_contains("refused")) {
      result.refused = json::value_to<std::string>(*refused);
      return out;
    }
    result.right = json::value_to<std::vector<int>>(object.at("right"));
    result.kl = json::value_to<std::vector<double>>(object.at("kl"));
    result.nll = object.at("nll").to_number<double>();
    result.n_tokens = object.at("n_tokens").to_number<std::int64_t>();
    result.full_bytes = object.at("full_bytes").to_number<std::uint64_t>();
    result.kept_bytes = object.at("kept_bytes").to_number<std::uint64_t>();
    result.compress_ms = object.at("compress_ms").to_number<double>();
    result.compressed_tokens = object.at("compressed_tokens").to_number<std::int64_t>();
    result.layer_bytes = json::value_to<std::vector<std::uint64_t>>(object.at("layer_bytes"));
    result.k_entries = object.at("k_entries").to_number<double>();
    result.v_entries = object.at("v_entries").to_number<double>();
    return out;
  } catch (const std::exception&) {
    return invalid_argument("not a result");
  }
}

Status EvalJournal::read(const json::object& settings) {
  std::ifstream in(path_, std::ios::binary);
  if (!in) return system_error("cannot read", path_);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  std::size_t begin = 0;
  for (int number = 1; begin < text.size(); ++number) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) break;  // cut while it was written
    boost::system::error_code error;
    const json::value line = json::parse({text.data() + begin, end - begin}, error);
    if (number == 1) {
      if (error || line != json::parse(json::serialize(settings))) {
        return invalid_argument(path_ +
                                " is of a run with other settings; remove it, or repeat "
                                "that run's settings. It says " +
                                text.substr(0, std::min<std::size_t>(end, 1000)) + ", this run " +
                                json::serialize(settings));
      }
    } else {
      Result<std::pair<ResultKey, CellResult>> result = parse_result(line);
      if (error || !result.ok()) {
        return invalid_argument(path_ + ", line " + std::to_string(number) + ": not a result");
      }
      earlier_.insert(*std::move(result));
    }
    begin = end + 1;
  }
  if (begin < text.size() && ::truncate(path_.c_str(), static_cast<off_t>(begin)) != 0) {
    return system_error("cannot shorten", path_);
  }
  return ok_status();
}

Result<std::unique_ptr<EvalJournal>> EvalJournal::open(const std::string& path,
                                                       const json::object& settings, bool resume) {
  std::unique_ptr<EvalJournal> journal(new EvalJournal(path));
  std::error_code ignored;
  const auto size = std::filesystem::file_size(path, ignored);
  const bool there = !ignored && size > 0;
  if (there && !resume) {
    return invalid_argument(path +
                            " holds the results of a run that did not finish; --resume "
                            "continues it, or remove it");
  }
  if (there) {
    if (Status status = journal->read(settings); !status.ok()) return status;
  }
  journal->file_.reset(std::fopen(path.c_str(), "ae"));
  if (!journal->file_) return system_error("cannot write", path);
  // A header that was cut leaves an empty file.
  if (!there || std::filesystem::file_size(path, ignored) == 0) {
    if (Status status = journal->write_line(settings); !status.ok()) return status;
  }
  return journal;
}

Status EvalJournal::write_line(const json::object& line) {
  const std::string text = json::serialize(line) + "\n";
  if (std::fwrite(text.data(), 1, text.size(), file_.get()) != text.size() ||
      std::fflush(file_.get()) != 0) {
    return system_error("cannot write", path_);
  }
  return ok_status();
}

Status EvalJournal::add(const ResultKey& key, const CellResult& result) {
  const std::lock_guard lock(mutex_);
  return write_line(to_json(key, result));
}

Status EvalJournal::remove() {
  file_.reset();
  if (::unlink(path_.c_str()) != 0) return system_error("cannot remove", path_);
  return ok_status();
}

}  // namespace spindle::cli
