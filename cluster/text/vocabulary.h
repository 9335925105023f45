#pragma once
// The tokens of a tokenizer: content, bytes and kind by id, and id by content.

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kernels/core/status.h"

namespace spindle::text {

// Owns all token strings. Ids may have holes; a hole has no content and no bytes.
//
// Thread-safety: const methods may be called by any number of threads once it is filled.
// Invariants: one content per id and one id per content.
class Vocabulary {
 public:
  // No model has a larger vocabulary; a larger id in a file is an error, not an allocation.
  static constexpr std::int64_t kMaxIds = std::int64_t{1} << 20;

  // An entry of the BPE model, written in the byte alphabet.
  Status add_model_token(std::string_view content, std::int64_t id);
  // An added token, written as it appears in text. It may repeat an entry of the model with the
  // same id and content; it then replaces that entry's bytes.
  Status add_added_token(std::string_view content, std::int64_t id, bool is_special);

  // The largest id plus one.
  std::size_t size() const { return entries_.size(); }
  std::optional<std::int32_t> find(std::string_view content) const;
  bool contains(std::int32_t id) const {
    return id >= 0 && static_cast<std::size_t>(id) < entries_.size() && entries_[id].is_used;
  }
  bool is_special(std::int32_t id) const { return contains(id) && entries_[id].is_special; }
  // Empty for ids that are not in the vocabulary.
  std::string_view content(std::int32_t id) const;
  std::string_view bytes(std::int32_t id) const;

 private:
  struct Entry {
    std::string_view content;
    std::string_view bytes;
    bool is_used = false;
    bool is_special = false;
  };

  Status check_id(std::string_view content, std::int64_t id) const;
  std::string_view store(std::string text);

  std::deque<std::string> strings_;  // a deque never moves its elements
  std::vector<Entry> entries_;
  std::unordered_map<std::string_view, std::int32_t> ids_;
};

}  // namespace spindle::text
