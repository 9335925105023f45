#include "cluster/text/tokenizer_json.h"

#include <array>
#include <string>
#include <utility>

#include "cluster/text/byte_alphabet.h"
#include "cluster/text/json_fields.h"
#include "cluster/text/normalizer.h"
#include "cluster/text/pre_tokenizer_json.h"
#include "cluster/text/utf8.h"

namespace spindle::text {
namespace {

constexpr std::size_t kMaxJsonDepth = 32;
constexpr std::size_t kMaxAddedTokenBytes = std::size_t{1} << 20;  // all contents together

using boost::json::value;

std::string_view view_of(const boost::json::string& string) {
  return {string.data(), string.size()};
}

// ---- model ----

Status read_vocabulary(const JsonFields& model, Vocabulary& vocabulary) {
  const auto* vocab = model.find("vocab");
  if (vocab == nullptr || !vocab->is_object()) {
    return invalid_argument("model.vocab must be an object");
  }
  for (const auto& [token, id] : vocab->get_object()) {
    const std::string_view content(token.data(), token.size());
    if (!id.is_int64()) {
      return invalid_argument("model.vocab: the id of \"" + std::string(content) +
                              "\" is not an integer");
    }
    const Status status = vocabulary.add_model_token(content, id.get_int64());
    if (!status.ok()) return status.with_context("model.vocab");
  }
  return {};
}

Result<std::pair<std::string_view, std::string_view>> merge_parts(const value& merge,
                                                                  const std::string& path) {
  if (const auto* joined = merge.if_string()) {
    const std::string_view text = view_of(*joined);
    const std::size_t space = text.find(' ');
    if (space != std::string_view::npos && text.find(' ', space + 1) == std::string_view::npos) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  } else if (const auto* pair = merge.if_array()) {
    if (pair->size() == 2 && (*pair)[0].is_string() && (*pair)[1].is_string()) {
      return std::pair(view_of((*pair)[0].get_string()), view_of((*pair)[1].get_string()));
    }
  }
  return invalid_argument(path + " must be \"left right\" or [\"left\", \"right\"]");
}

Result<std::vector<BpeMerge>> read_merges(const JsonFields& model, const Vocabulary& vocabulary) {
  const auto entries = model.array("merges");
  if (!entries.ok()) return entries.status();
  std::vector<BpeMerge> merges;
  merges.reserve((*entries)->size());
  std::string merged;
  for (std::size_t i = 0; i < (*entries)->size(); ++i) {
    const std::string path = "model.merges[" + std::to_string(i) + "]";
    const auto parts = merge_parts((**entries)[i], path);
    if (!parts.ok()) return parts.status();
    merged.assign(parts->first).append(parts->second);
    const auto left = vocabulary.find(parts->first);
    const auto right = vocabulary.find(parts->second);
    const auto result = vocabulary.find(merged);
    if (!left || !right || !result) {
      const std::string_view missing = !left ? parts->first : !right ? parts->second : merged;
      return invalid_argument(path + ": \"" + std::string(missing) + "\" is not in the vocabulary");
    }
    merges.push_back({*left, *right, *result});
  }
  return merges;
}

// Bytes that no valid UTF-8 text contains.
bool never_in_utf8(unsigned byte) { return byte == 0xC0 || byte == 0xC1 || byte > 0xF4; }

// With a token for every byte that can occur, the unknown-token and byte-fallback settings cannot
// matter, so this is all that has to hold to ignore them.
Result<std::array<std::int32_t, 256>> find_byte_tokens(const Vocabulary& vocabulary) {
  std::array<std::int32_t, 256> ids{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    std::string character;
    append_utf8(character, ByteAlphabet::to_character(static_cast<std::uint8_t>(byte)));
    const auto id = vocabulary.find(character);
    if (!id && !never_in_utf8(byte)) {
      return unimplemented("model.vocab has no token for the byte " + std::to_string(byte) +
                           " (\"" + character + "\"); only complete byte-level vocabularies load");
    }
    ids[byte] = id.value_or(Bpe::kNoToken);
  }
  return ids;
}

Status refuse_unsupported_model(const JsonFields& model) {
  const auto type = model.string("type", "BPE");
  if (!type.ok()) return type.status();
  if (*type != "BPE") return unimplemented("model.type " + std::string(*type));
  if (const auto* dropout = model.find("dropout")) {
    const bool is_zero = (dropout->is_double() && dropout->get_double() == 0.0) ||
                         (dropout->is_int64() && dropout->get_int64() == 0);
    if (!is_zero) return unimplemented("model.dropout other than null or 0");
  }
  for (const std::string_view key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const auto affix = model.string(key, "");
    if (!affix.ok()) return affix.status();
    if (!affix->empty()) return unimplemented(model.path_of(key) + " other than null or empty");
  }
  return {};
}

Status read_model(const JsonFields& root, TokenizerParts& parts) {
  const auto model = root.object("model");
  if (!model.ok()) return model.status();
  Status status = refuse_unsupported_model(*model);
  if (!status.ok()) return status;
  status = read_vocabulary(*model, parts.vocabulary);
  if (!status.ok()) return status;
  const auto byte_ids = find_byte_tokens(parts.vocabulary);
  if (!byte_ids.ok()) return byte_ids.status();
  const auto merges = read_merges(*model, parts.vocabulary);
  if (!merges.ok()) return merges.status();
  parts.bpe = std::make_unique<const Bpe>(*byte_ids, *merges);
  return {};
}

// After the added tokens are known: a word of ordinary text must never become a special token.
Status index_words(const JsonFields& root, TokenizerParts& parts) {
  const auto model = root.object("model");
  if (!model.ok()) return model.status();
  const auto ignore_merges = model->boolean("ignore_merges", false);
  if (!ignore_merges.ok()) return ignore_merges.status();
  const auto n_ids = static_cast<std::int32_t>(parts.vocabulary.size());
  for (std::int32_t id = 0; id < n_ids; ++id) {
    const std::string_view bytes = parts.vocabulary.bytes(id);
    parts.max_token_bytes = std::max(parts.max_token_bytes, bytes.size());
    if (!*ignore_merges || parts.vocabulary.is_special(id)) continue;
    if (ByteAlphabet::to_bytes(parts.vocabulary.content(id)).has_value()) {
      parts.whole_words.emplace(bytes, id);
    }
  }
  return {};
}

// ---- normaliser ----

Status read_normalizer_step(const value& step, const std::string& path, bool& nfc) {
  const auto fields = JsonFields::of(step, path);
  if (!fields.ok()) return fields.status();
  const auto type = fields->string("type");
  if (!type.ok()) return type.status();
  if (*type != "NFC") return unimplemented(path + ".type " + std::string(*type));
  nfc = true;
  return {};
}

Status read_normalizer(const JsonFields& root, bool& nfc) {
  const auto* normalizer = root.find("normalizer");
  if (normalizer == nullptr) return {};
  const auto fields = JsonFields::of(*normalizer, "normalizer");
  if (!fields.ok()) return fields.status();
  const auto type = fields->string("type");
  if (!type.ok()) return type.status();
  if (*type != "Sequence") return read_normalizer_step(*normalizer, "normalizer", nfc);
  const auto steps = fields->array("normalizers");
  if (!steps.ok()) return steps.status();
  for (const value& step : **steps) {
    const Status status = read_normalizer_step(step, "normalizer.normalizers", nfc);
    if (!status.ok()) return status;
  }
  return {};
}

// ---- added tokens ----

Result<AddedToken> read_added_token(const value& entry, const std::string& path) {
  const auto fields = JsonFields::of(entry, path);
  if (!fields.ok()) return fields.status();
  const auto content = fields->string("content");
  if (!content.ok()) return content.status();
  const auto* id = fields->find("id");
  if (id == nullptr || !id->is_int64() || id->get_int64() < 0 ||
      id->get_int64() >= Vocabulary::kMaxIds) {
    return invalid_argument(path + ".id must be an integer in 0.." +
                            std::to_string(Vocabulary::kMaxIds - 1));
  }
  AddedToken token{.id = static_cast<std::int32_t>(id->get_int64()),
                   .content = std::string(*content),
                   .single_word = false,
                   .lstrip = false,
                   .rstrip = false,
                   .normalized = false,
                   .special = false};
  const auto special = fields->boolean("special", false);
  if (!special.ok()) return special.status();
  token.special = *special;
  const std::array<std::pair<std::string_view, bool AddedToken::*>, 4> flags = {{
      {"single_word", &AddedToken::single_word},
      {"lstrip", &AddedToken::lstrip},
      {"rstrip", &AddedToken::rstrip},
      {"normalized", &AddedToken::normalized},
  }};
  for (const auto& [key, member] : flags) {
    const auto flag = fields->boolean(key, key == "normalized" && !token.special);
    if (!flag.ok()) return flag.status();
    token.*member = *flag;
  }
  return token;
}

Status read_added_tokens(const JsonFields& root, TokenizerParts& parts) {
  std::vector<AddedToken> raw;
  std::vector<AddedToken> normalized;
  std::vector<bool> seen(static_cast<std::size_t>(Vocabulary::kMaxIds), false);
  std::size_t n_bytes = 0;
  const auto* list = root.find("added_tokens");
  if (list != nullptr && !list->is_array()) {
    return invalid_argument("added_tokens must be an array");
  }
  for (std::size_t i = 0; list != nullptr && i < list->get_array().size(); ++i) {
    const std::string path = "added_tokens[" + std::to_string(i) + "]";
    auto token = read_added_token(list->get_array()[i], path);
    if (!token.ok()) return token.status();
    if (seen[token->id]) {
      return invalid_argument(path + ": id " + std::to_string(token->id) + " occurs twice");
    }
    seen[token->id] = true;
    const Status status =
        parts.vocabulary.add_added_token(token->content, token->id, token->special);
    if (!status.ok()) return status.with_context(path);
    n_bytes += token->content.size();
    if (n_bytes > kMaxAddedTokenBytes) {
      return too_large("added_tokens: more than " + std::to_string(kMaxAddedTokenBytes) +
                       " bytes of content");
    }
    if (token->normalized && parts.normalize_nfc) {
      auto content = to_nfc(token->content);
      if (!content.ok()) return content.status().with_context(path);
      token->content = *std::move(content);
    }
    (token->normalized ? normalized : raw).push_back(*std::move(token));
  }
  parts.raw_added_tokens = std::make_unique<const AddedTokenScanner>(std::move(raw));
  parts.normalized_added_tokens = std::make_unique<const AddedTokenScanner>(std::move(normalized));
  return {};
}

// ---- decoder ----

// "ByteLevel", or a Sequence of exactly one of it and steps that do nothing after it.
Status check_decoder(const JsonFields& root) {
  const auto decoder = root.object("decoder");
  if (!decoder.ok()) return decoder.status().with_context("only byte-level tokenizers load");
  const auto type = decoder->string("type");
  if (!type.ok()) return type.status();
  if (*type == "ByteLevel") return {};
  if (*type != "Sequence") return unimplemented("decoder.type " + std::string(*type));
  const auto steps = decoder->array("decoders");
  if (!steps.ok()) return steps.status();
  std::size_t n_byte_level = 0;
  for (const value& step : **steps) {
    const auto fields = JsonFields::of(step, "decoder.decoders");
    if (!fields.ok()) return fields.status();
    const auto step_type = fields->string("type");
    if (!step_type.ok()) return step_type.status();
    if (*step_type == "ByteLevel") {
      ++n_byte_level;
    } else if (*step_type != "Fuse") {
      return unimplemented("decoder.decoders.type " + std::string(*step_type));
    }
  }
  const bool begins_right =
      !(*steps)->empty() && (*steps)->front().at("type").as_string() == "ByteLevel";
  if (n_byte_level != 1 || !begins_right) {
    return unimplemented("a decoder Sequence that is not one ByteLevel, then Fuse");
  }
  return {};
}

// ---- post-processor ----

Status append_special(const JsonFields& processor, const std::string& name,
                      const Vocabulary& vocabulary, std::vector<std::int32_t>& ids) {
  const auto table = processor.object("special_tokens");
  if (!table.ok()) return table.status();
  const auto entry = table->object(name);
  if (!entry.ok()) return entry.status();
  const auto list = entry->array("ids");
  if (!list.ok()) return list.status();
  for (const value& id : **list) {
    if (!id.is_int64() || id.get_int64() < 0 || id.get_int64() >= Vocabulary::kMaxIds ||
        !vocabulary.contains(static_cast<std::int32_t>(id.get_int64()))) {
      return invalid_argument(entry->path() + ".ids: not an id of the vocabulary");
    }
    ids.push_back(static_cast<std::int32_t>(id.get_int64()));
  }
  return {};
}

Status read_template(const JsonFields& processor, TokenizerParts& parts) {
  const auto items = processor.array("single");
  if (!items.ok()) return items.status();
  std::vector<std::int32_t> before;
  std::vector<std::int32_t> after;
  std::size_t n_sequences = 0;
  for (std::size_t i = 0; i < (*items)->size(); ++i) {
    const std::string path = processor.path_of("single[" + std::to_string(i) + "]");
    const auto item = JsonFields::of((**items)[i], path);
    if (!item.ok()) return item.status();
    if (item->find("Sequence") != nullptr) {
      ++n_sequences;
      continue;
    }
    const auto special = item->object("SpecialToken");
    if (!special.ok()) return special.status();
    const auto name = special->string("id");
    if (!name.ok()) return name.status();
    const Status status = append_special(processor, std::string(*name), parts.vocabulary,
                                         n_sequences == 0 ? before : after);
    if (!status.ok()) return status;
  }
  if (n_sequences != 1) return unimplemented(processor.path() + ".single without one Sequence");
  // Processors apply in order, each around the result of the one before.
  parts.prefix_ids.insert(parts.prefix_ids.begin(), before.begin(), before.end());
  parts.suffix_ids.insert(parts.suffix_ids.end(), after.begin(), after.end());
  return {};
}

Status read_post_processor_step(const value& step, const std::string& path, TokenizerParts& parts) {
  const auto fields = JsonFields::of(step, path);
  if (!fields.ok()) return fields.status();
  const auto type = fields->string("type");
  if (!type.ok()) return type.status();
  if (*type == "ByteLevel") return {};  // moves offsets only
  if (*type == "TemplateProcessing") return read_template(*fields, parts);
  return unimplemented(path + ".type " + std::string(*type));
}

Status read_post_processor(const JsonFields& root, TokenizerParts& parts) {
  const auto* processor = root.find("post_processor");
  if (processor == nullptr) return {};
  const auto fields = JsonFields::of(*processor, "post_processor");
  if (!fields.ok()) return fields.status();
  const auto type = fields->string("type");
  if (!type.ok()) return type.status();
  if (*type != "Sequence") return read_post_processor_step(*processor, "post_processor", parts);
  const auto steps = fields->array("processors");
  if (!steps.ok()) return steps.status();
  for (std::size_t i = 0; i < (*steps)->size(); ++i) {
    const std::string path = "post_processor.processors[" + std::to_string(i) + "]";
    const Status status = read_post_processor_step((**steps)[i], path, parts);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

Result<TokenizerParts> parse_tokenizer_json(std::string_view json) {
  if (json.size() > kMaxTokenizerFileBytes) {
    return too_large("tokenizer.json has " + std::to_string(json.size()) + " bytes, the limit is " +
                     std::to_string(kMaxTokenizerFileBytes));
  }
  const auto document = parse_json(json, kMaxJsonDepth);
  if (!document.ok()) return document.status();
  const auto root = JsonFields::of(*document, "");
  if (!root.ok()) return root.status().with_context("tokenizer.json");

  TokenizerParts parts;
  Status status = read_model(*root, parts);
  if (status.ok()) status = read_normalizer(*root, parts.normalize_nfc);
  if (status.ok()) status = read_added_tokens(*root, parts);
  if (status.ok()) status = index_words(*root, parts);
  if (status.ok()) status = check_decoder(*root);
  if (status.ok()) status = read_post_processor(*root, parts);
  if (!status.ok()) return status;
  auto pre_tokenizer = read_pre_tokenizer(*root);
  if (!pre_tokenizer.ok()) return pre_tokenizer.status();
  parts.pre_tokenizer = std::make_unique<const PreTokenizer>(*std::move(pre_tokenizer));
  return parts;
}

}  // namespace spindle::text
