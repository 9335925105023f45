#include "cluster/text/tokenizer.h"

#include <utility>

#include "cluster/text/file_reader.h"
#include "cluster/text/normalizer.h"
#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

// Only a hostile pattern or text comes near this.
constexpr std::int64_t kSplitBudgetMs = 10'000;

Status too_many_tokens(std::size_t max_tokens) {
  return invalid_argument("the text has more than " + std::to_string(max_tokens) + " tokens");
}

}  // namespace

struct Tokenizer::EncodeState {
  const EncodeOptions& options;
  std::size_t max_text_tokens;  // max_tokens less the tokens around the text
  Deadline deadline = Deadline::after_ms(kSplitBudgetMs);
  PatternScratch pattern_scratch{};
  BpeScratch bpe_scratch{};
  std::vector<std::int32_t> ids{};

  Status check_count() const {
    return ids.size() > max_text_tokens ? too_many_tokens(options.max_tokens) : ok_status();
  }
};

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::filesystem::path& model_folder) {
  const std::filesystem::path path = model_folder / "tokenizer.json";
  auto json = read_file(path, kMaxTokenizerFileBytes);
  if (!json.ok()) return json.status();
  auto tokenizer = from_json(*json);
  if (!tokenizer.ok()) return tokenizer.status().with_context(path.string());
  return tokenizer;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::from_json(std::string_view json) {
  auto parts = parse_tokenizer_json(json);
  if (!parts.ok()) return parts.status();
  return std::unique_ptr<Tokenizer>(new Tokenizer(*std::move(parts)));
}

Result<std::vector<std::int32_t>> Tokenizer::encode(std::string_view utf8,
                                                    const EncodeOptions& options) const {
  if (utf8.size() > kMaxTextBytes) {
    return too_large("the text has " + std::to_string(utf8.size()) + " bytes, the limit is " +
                     std::to_string(kMaxTextBytes));
  }
  if (const auto offset = find_invalid_utf8(utf8)) {
    return invalid_argument("the text is not valid UTF-8 at byte " + std::to_string(*offset));
  }
  const std::size_t n_around =
      options.add_special_tokens ? parts_.prefix_ids.size() + parts_.suffix_ids.size() : 0;
  if (n_around > options.max_tokens) return too_many_tokens(options.max_tokens);
  EncodeState state{.options = options, .max_text_tokens = options.max_tokens - n_around};
  if (options.add_special_tokens) state.ids = parts_.prefix_ids;
  state.max_text_tokens += state.ids.size();

  std::vector<TextSegment> segments;
  parts_.raw_added_tokens->split(utf8, options.parse_special, segments);
  for (const TextSegment& segment : segments) {
    Status status;
    if (segment.id) {
      state.ids.push_back(*segment.id);
      status = state.check_count();
    } else if (parts_.normalize_nfc && !is_trivially_nfc(segment.text)) {
      const auto normalized = to_nfc(segment.text);
      if (!normalized.ok()) return normalized.status();
      status = encode_normalized(*normalized, state);
    } else {
      status = encode_normalized(segment.text, state);
    }
    if (!status.ok()) return status;
  }
  if (options.add_special_tokens) {
    state.ids.insert(state.ids.end(), parts_.suffix_ids.begin(), parts_.suffix_ids.end());
  }
  return std::move(state.ids);
}

Status Tokenizer::encode_normalized(std::string_view text, EncodeState& state) const {
  std::vector<TextSegment> segments;
  parts_.normalized_added_tokens->split(text, state.options.parse_special, segments);
  for (const TextSegment& segment : segments) {
    if (segment.id) {
      state.ids.push_back(*segment.id);
      const Status status = state.check_count();
      if (!status.ok()) return status;
      continue;
    }
    const Status status = encode_plain(segment.text, state);
    if (!status.ok()) return status;
  }
  return {};
}

Status Tokenizer::encode_plain(std::string_view text, EncodeState& state) const {
  return parts_.pre_tokenizer->split(
      text, state.deadline, state.pattern_scratch,
      [this, &state](std::string_view word) { return encode_word(word, state); });
}

Status Tokenizer::encode_word(std::string_view word, EncodeState& state) const {
  const auto whole = parts_.whole_words.find(word);
  if (whole != parts_.whole_words.end()) {
    state.ids.push_back(whole->second);
    return state.check_count();
  }
  // No token is longer than max_token_bytes, so this many are certain before any work is done.
  const std::size_t n_at_least = word.size() / parts_.max_token_bytes;
  if (state.ids.size() + n_at_least > state.max_text_tokens) {
    return too_many_tokens(state.options.max_tokens);
  }
  parts_.bpe->encode_word(word, state.bpe_scratch, state.ids);
  return state.check_count();
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string text;
  LossyUtf8Decoder decoder;
  for (const std::int32_t id : ids) {
    if (skip_special && is_special(id)) continue;
    decoder.feed(token_bytes(id), text);
  }
  decoder.finish(text);
  return text;
}

std::string Tokenizer::token_text(std::int32_t id) const {
  std::string text;
  LossyUtf8Decoder decoder;
  decoder.feed(token_bytes(id), text);
  decoder.finish(text);
  return text;
}

}  // namespace spindle::text
