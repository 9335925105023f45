#pragma once
// A tokenizer.json small enough to follow by eye: the 256 byte tokens (id = byte), then the merges
// given by the test, then added tokens.

#include <boost/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/text/byte_alphabet.h"
#include "cluster/text/utf8.h"

namespace spindle::text {

inline std::string alphabet_form(std::string_view bytes) {
  std::string form;
  for (const char c : bytes)
    append_utf8(form, ByteAlphabet::to_character(static_cast<unsigned char>(c)));
  return form;
}

struct TinyTokenizer {
  // Pairs of raw bytes; the n-th merge makes the token 256 + n.
  std::vector<std::pair<std::string, std::string>> merges;
  boost::json::array added_tokens{};
  bool merges_as_pairs = false;
  bool ignore_merges = false;
  boost::json::value normalizer{};
  boost::json::value pre_tokenizer = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  boost::json::value post_processor{};
  boost::json::value decoder = {{"type", "ByteLevel"}};

  boost::json::object build() const {
    boost::json::object vocab;
    for (int byte = 0; byte < 256; ++byte) {
      vocab[alphabet_form(std::string(1, static_cast<char>(byte)))] = byte;
    }
    boost::json::array merge_list;
    int next = 256;
    for (const auto& [left, right] : merges) {
      const std::string l = alphabet_form(left);
      const std::string r = alphabet_form(right);
      if (merges_as_pairs) {
        merge_list.push_back(boost::json::array{l, r});
      } else {
        merge_list.push_back(boost::json::string(l + " " + r));
      }
      vocab[l + r] = next++;
    }
    return {{"version", "1.0"},
            {"truncation", nullptr},
            {"padding", nullptr},
            {"added_tokens", added_tokens},
            {"normalizer", normalizer},
            {"pre_tokenizer", pre_tokenizer},
            {"post_processor", post_processor},
            {"decoder", decoder},
            {"model",
             {{"type", "BPE"},
              {"dropout", nullptr},
              {"unk_token", nullptr},
              {"continuing_subword_prefix", nullptr},
              {"end_of_word_suffix", nullptr},
              {"fuse_unk", false},
              {"byte_fallback", false},
              {"ignore_merges", ignore_merges},
              {"vocab", vocab},
              {"merges", merge_list}}}};
  }

  std::string json() const { return boost::json::serialize(build()); }
};

struct AddedTokenFlags {
  bool special = true;
  bool single_word = false;
  bool lstrip = false;
  bool rstrip = false;
  bool normalized = false;
};

inline boost::json::object added_token(int id, std::string_view content,
                                       AddedTokenFlags flags = {}) {
  return {{"id", id},
          {"content", content},
          {"single_word", flags.single_word},
          {"lstrip", flags.lstrip},
          {"rstrip", flags.rstrip},
          {"normalized", flags.normalized},
          {"special", flags.special}};
}

}  // namespace spindle::text
