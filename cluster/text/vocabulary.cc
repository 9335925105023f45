#include "cluster/text/vocabulary.h"

#include <utility>

#include "cluster/text/byte_alphabet.h"

namespace spindle::text {

Status Vocabulary::check_id(std::string_view content, std::int64_t id) const {
  if (id < 0 || id >= kMaxIds) {
    return invalid_argument("token \"" + std::string(content) + "\": id " + std::to_string(id) +
                            " is outside 0.." + std::to_string(kMaxIds - 1));
  }
  return {};
}

std::string_view Vocabulary::store(std::string text) {
  strings_.push_back(std::move(text));
  return strings_.back();
}

Status Vocabulary::add_model_token(std::string_view content, std::int64_t id) {
  const Status status = check_id(content, id);
  if (!status.ok()) return status;
  if (contains(static_cast<std::int32_t>(id)) || ids_.contains(content)) {
    return invalid_argument("token \"" + std::string(content) + "\": id " + std::to_string(id) +
                            " or its content occurs twice");
  }
  if (static_cast<std::size_t>(id) >= entries_.size()) entries_.resize(id + 1);
  Entry& entry = entries_[id];
  entry.is_used = true;
  entry.content = store(std::string(content));
  auto bytes = ByteAlphabet::to_bytes(content);
  entry.bytes = bytes && *bytes != content ? store(*std::move(bytes)) : entry.content;
  ids_.emplace(entry.content, static_cast<std::int32_t>(id));
  return {};
}

Status Vocabulary::add_added_token(std::string_view content, std::int64_t id, bool is_special) {
  const Status status = check_id(content, id);
  if (!status.ok()) return status;
  const auto known = ids_.find(content);
  if (known != ids_.end() && known->second != id) {
    return invalid_argument("added token \"" + std::string(content) + "\" has id " +
                            std::to_string(id) + ", but the vocabulary says " +
                            std::to_string(known->second));
  }
  if (known == ids_.end()) {
    if (contains(static_cast<std::int32_t>(id))) {
      return invalid_argument("added token \"" + std::string(content) + "\": id " +
                              std::to_string(id) + " belongs to another token");
    }
    if (static_cast<std::size_t>(id) >= entries_.size()) entries_.resize(id + 1);
    entries_[id].is_used = true;
    entries_[id].content = store(std::string(content));
    ids_.emplace(entries_[id].content, static_cast<std::int32_t>(id));
  }
  entries_[id].bytes = entries_[id].content;
  entries_[id].is_special = is_special;
  return {};
}

std::optional<std::int32_t> Vocabulary::find(std::string_view content) const {
  const auto found = ids_.find(content);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::string_view Vocabulary::content(std::int32_t id) const {
  return contains(id) ? entries_[id].content : std::string_view();
}

std::string_view Vocabulary::bytes(std::int32_t id) const {
  return contains(id) ? entries_[id].bytes : std::string_view();
}

}  // namespace spindle::text
