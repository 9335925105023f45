#include "cluster/comm/agreement.h"

#include <cstdint>
#include <string>
#include <vector>

#include "cluster/comm/frame.h"

namespace spindle::comm {
namespace {

constexpr std::size_t kMaxNameBytes = 256;
constexpr std::size_t kMaxShownBytes = 160;  // of a line, in a message

std::string_view next_line(std::string_view& text) {
  const std::size_t end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
  return line;
}

std::string quoted(std::string_view line) {
  if (line.size() <= kMaxShownBytes) return "\"" + std::string(line) + "\"";
  return "\"" + std::string(line.substr(0, kMaxShownBytes)) + "...\"";
}

std::string first_difference(std::string_view value_0, std::string_view value_r, int rank) {
  for (int line = 1;; ++line) {
    const bool end_0 = value_0.empty();
    const bool end_r = value_r.empty();
    const std::string_view line_0 = next_line(value_0);
    const std::string_view line_r = next_line(value_r);
    // Both at the end: they differ only in their last newline.
    if (line_0 == line_r && end_0 == end_r && !end_0) continue;
    return "line " + std::to_string(line) + " is " + (end_0 ? "missing" : quoted(line_0)) +
           " on rank 0 and " + (end_r ? "missing" : quoted(line_r)) + " on rank " +
           std::to_string(rank);
  }
}

}  // namespace

Status verify_same_on_all_ranks(HostGroup& group, std::string_view what, std::string_view value,
                                Deadline deadline) {
  if (what.size() > kMaxNameBytes) return invalid_argument("the name of a value is too long");
  const std::string name(what);
  auto digests = group.all_gather(
      name + "\n" + std::to_string(value.size()) + " " + std::to_string(hash_bytes(value)),
      deadline);
  if (!digests.ok()) return digests.status().with_context("comparing " + name);

  std::vector<std::size_t> differing;
  std::string names;
  for (std::size_t rank = 1; rank < digests->size(); ++rank) {
    if ((*digests)[rank] == (*digests)[0]) continue;
    names += (names.empty() ? "" : ", ") + std::to_string(rank);
    differing.push_back(rank);
  }
  if (differing.empty()) return {};

  const std::string who = std::string(differing.size() == 1 ? "rank " : "ranks ") + names +
                          (differing.size() == 1 ? " differs" : " differ") + " from rank 0 in ";
  const std::size_t first = differing.front();
  std::string_view digest_0 = (*digests)[0];
  std::string_view digest_r = (*digests)[first];
  const std::string_view name_0 = next_line(digest_0);
  const std::string_view name_r = next_line(digest_r);
  if (name_0 != name_r) {
    return invalid_argument(who + "what they compare: " + quoted(name_0) + " on rank 0, " +
                            quoted(name_r) + " on rank " + std::to_string(first));
  }
  auto values = group.all_gather(value, deadline);
  if (!values.ok()) return values.status().with_context(who + std::string(name_0));
  return invalid_argument(
      who + std::string(name_0) + ": " +
      first_difference((*values)[0], (*values)[first], static_cast<int>(first)));
}

}  // namespace spindle::comm
