#pragma once
// Results of finished cells, so that a run that was ended can go on: JSON Lines, a header with the
// settings, then one line for each (item, cell).
//
// Thread-safety: add() may be called from several threads; the rest from one.

#include <boost/json.hpp>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "kernels/core/status.h"
#include "ops/cli/eval_score.h"

namespace spindle::cli {

// By item ("qa:12", "prose-4096:3") and cell ("spindle/25").
using ResultKey = std::pair<std::string, std::string>;
using Results = std::map<ResultKey, CellResult>;

boost::json::object to_json(const ResultKey& key, const CellResult& result);
Result<std::pair<ResultKey, CellResult>> parse_result(const boost::json::value& line);

class EvalJournal {
 public:
  // `resume`: reads what is there, refusing another header; a last line that was cut is dropped.
  // Otherwise a journal that is there is an error, so that nobody loses hours of work by a typo.
  static Result<std::unique_ptr<EvalJournal>> open(const std::string& path,
                                                   const boost::json::object& settings,
                                                   bool resume);

  // What was read at open().
  const Results& earlier() const { return earlier_; }
  Status add(const ResultKey& key, const CellResult& result);
  // Closes and deletes the file.
  Status remove();

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  explicit EvalJournal(std::string path) : path_(std::move(path)) {}
  Status read(const boost::json::object& settings);
  Status write_line(const boost::json::object& line);

  std::string path_;
  Results earlier_;
  std::mutex mutex_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace spindle::cli
