// Damaged and hostile files against every reader: each must end in a clear Status or a file that
// keeps its invariants, within bounded memory; the sanitizers look on.

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <random>
#include <string>
#include <vector>

#include "tests/worker/model/model_files.h"
#include "worker/model/checkpoint.h"
#include "worker/model/generation_config.h"
#include "worker/model/llama_weights.h"
#include "worker/model/model_config.h"

namespace spindle::model {
namespace {

constexpr std::uint64_t kSeed = 20240817;
constexpr int kMutations = 4000;

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t n) { return n == 0 ? 0 : random() % n; }

const std::vector<std::string>& numbers() {
  static const std::vector<std::string> kNumbers = {"0",
                                                    "1",
                                                    "-1",
                                                    "7",
                                                    "255",
                                                    "2147483648",
                                                    "4294967296",
                                                    "9223372036854775807",
                                                    "9223372036854775808",
                                                    "18446744073709551615",
                                                    "18446744073709551616",
                                                    "1e308",
                                                    "1e999",
                                                    "0.5",
                                                    "-0"};
  return kNumbers;
}

const std::vector<std::string>& tokens() {
  static const std::vector<std::string> kTokens = {"{",
                                                   "}",
                                                   "[",
                                                   "]",
                                                   ",",
                                                   ":",
                                                   "\"",
                                                   "null",
                                                   "true",
                                                   "[]",
                                                   "{}",
                                                   "\"a\":1,",
                                                   "\\",
                                                   "\\ud800",
                                                   "\\u0000",
                                                   "\xff",
                                                   "\xc3",
                                                   " ",
                                                   "\n",
                                                   "BF16",
                                                   "I64",
                                                   "\"shape\"",
                                                   "\"dtype\":\"F32\",",
                                                   "../",
                                                   "\"__metadata__\":{},",
                                                   "\"rope_theta\":1,"};
  return kTokens;
}

// Replaces a number somewhere in the text.
void change_number(Random& random, std::string& text) {
  std::vector<std::size_t> digits;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (std::isdigit(static_cast<unsigned char>(text[i])) != 0) digits.push_back(i);
  }
  if (digits.empty()) return;
  const std::size_t at = digits[below(random, digits.size())];
  std::size_t begin = at;
  std::size_t end = at;
  while (begin > 0 && std::isdigit(static_cast<unsigned char>(text[begin - 1])) != 0) --begin;
  while (end < text.size() && std::isdigit(static_cast<unsigned char>(text[end])) != 0) ++end;
  text.replace(begin, end - begin, numbers()[below(random, numbers().size())]);
}

// One small change that keeps most of the structure of the JSON.
void mutate_json(Random& random, std::string& text) {
  const std::size_t at = below(random, text.size());
  const std::size_t length = below(random, std::min<std::size_t>(text.size() - at, 64));
  switch (below(random, 6)) {
    case 0:
    case 1:
      return change_number(random, text);
    case 2:
      text.erase(at, length);
      return;
    case 3:
      text.insert(below(random, text.size()), text.substr(at, length));
      return;
    case 4:
      text.insert(at, tokens()[below(random, tokens().size())]);
      return;
    default:
      if (!text.empty()) text[at] = static_cast<char>(random());
  }
}

std::vector<FileTensor> small_tensors() {
  return {counting_tensor("first.weight", DType::kBF16, {4, 3}, 0),
          counting_tensor("second.weight", DType::kF32, {2, 2, 2}, 5),
          counting_tensor("third.bias", DType::kF16, {7}, 9),
          counting_tensor("empty", DType::kF32, {0, 3}, 0)};
}

// An accepted file must hold what the reader promises.
void expect_invariants(const SafetensorsFile& file) {
  std::uint64_t covered = 0;
  std::vector<std::string> names;
  for (const TensorInfo& tensor : file.tensors()) {
    ASSERT_EQ(tensor.begin, covered);
    covered = tensor.end;
    ASSERT_LE(tensor.shape.size(), kMaxTensorRank);
    std::string bytes(tensor.n_bytes(), '\0');
    ASSERT_TRUE(file.read(tensor, std::as_writable_bytes(std::span(bytes))).ok());
    ASSERT_EQ(file.find(tensor.name), &tensor);
    names.push_back(tensor.name);
  }
  std::sort(names.begin(), names.end());
  ASSERT_EQ(std::adjacent_find(names.begin(), names.end()), names.end());
}

TEST(HostileFiles, EveryTruncationIsRefused) {
  const TempDir dir;
  const std::string whole = safetensors_file(small_tensors());
  for (int percent = 0; percent < 100; ++percent) {
    const std::size_t n = whole.size() * static_cast<std::size_t>(percent) / 100;
    const auto file = SafetensorsFile::open(dir.write("x", whole.substr(0, n)));
    ASSERT_FALSE(file.ok()) << n << " of " << whole.size() << " bytes";
    EXPECT_FALSE(file.status().message().empty());
  }
  EXPECT_TRUE(SafetensorsFile::open(dir.write("x", whole)).ok());
}

TEST(HostileFiles, EveryByteOfTheHeaderRemoved) {
  const TempDir dir;
  const std::string header = safetensors_header(small_tensors());
  const std::string data = safetensors_file(small_tensors()).substr(8 + header.size());
  int accepted = 0;
  for (std::size_t i = 0; i < header.size(); ++i) {
    std::string shorter = header;
    shorter.erase(i, 1);
    const auto file = SafetensorsFile::open(dir.write("x", safetensors_bytes(shorter, data)));
    if (!file.ok()) continue;
    ++accepted;  // a name or the metadata lost a letter
    expect_invariants(*file);
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 80);
}

TEST(HostileFiles, MutatedSafetensors) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  const TempDir dir;
  const std::string header = safetensors_header(small_tensors());
  const std::string data = safetensors_file(small_tensors()).substr(8 + header.size());
  int accepted = 0;
  for (int i = 0; i < kMutations; ++i) {
    std::string changed = header;
    std::string bytes = data;
    for (std::size_t n = 1 + below(random, 3); n > 0; --n) mutate_json(random, changed);
    if (below(random, 8) == 0) bytes.resize(below(random, 2 * data.size()));
    std::uint64_t length = changed.size();
    if (below(random, 8) == 0) length = random() >> below(random, 64);
    const auto file =
        SafetensorsFile::open(dir.write("x", safetensors_bytes(changed, bytes, length)));
    if (!file.ok()) {
      ASSERT_FALSE(file.status().message().empty());
      ASSERT_LT(file.status().message().size(), 1000u);
      continue;
    }
    ++accepted;
    expect_invariants(*file);
    if (HasFatalFailure()) FAIL() << "mutation " << i << ": " << changed;
  }
  EXPECT_GT(accepted, kMutations / 100);
  EXPECT_LT(accepted, kMutations / 2);
}

TEST(HostileFiles, MutatedIndex) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  const TempDir dir;
  const std::string index = index_json({{"first.weight", "a.safetensors"},
                                        {"second.weight", "a.safetensors"},
                                        {"third.bias", "b.safetensors"}});
  const std::vector<FileTensor> tensors = small_tensors();
  dir.write("a.safetensors", safetensors_file(std::span(tensors).first(2)));
  dir.write("b.safetensors", safetensors_file(std::span(tensors).subspan(2)));
  int accepted = 0;
  for (int i = 0; i < kMutations; ++i) {
    std::string changed = index;
    for (std::size_t n = 1 + below(random, 2); n > 0; --n) mutate_json(random, changed);
    dir.write("model.safetensors.index.json", changed);
    const auto checkpoint = Checkpoint::open(dir.path());
    if (!checkpoint.ok()) continue;
    ++accepted;
    for (const std::string& name : checkpoint->names()) {
      const auto tensor = checkpoint->find(name);
      if (!tensor.ok()) continue;
      ASSERT_EQ(tensor->info->name, name) << changed;
    }
    for (const std::string& shard : checkpoint->opened_shards()) {
      ASSERT_TRUE(shard == "a.safetensors" || shard == "b.safetensors") << changed;
    }
  }
  EXPECT_GT(accepted, kMutations / 100);
}

TEST(HostileFiles, MutatedConfigs) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  const std::string config =
      tiny_config(true).insert(1, R"("rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3",
        "factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,
        "original_max_position_embeddings":8192},"eos_token_id":[2,3],"hidden_act":"silu",)");
  const std::string generation =
      R"({"eos_token_id":[1,2],"do_sample":true,"temperature":0.5,"top_k":5,"top_p":0.9})";
  ASSERT_TRUE(parse_model_config(config).ok());
  int accepted = 0;
  for (int i = 0; i < kMutations; ++i) {
    std::string changed = config;
    for (std::size_t n = 1 + below(random, 2); n > 0; --n) mutate_json(random, changed);
    const auto parsed = parse_model_config(changed);
    if (parsed.ok()) {
      ++accepted;
      ASSERT_EQ(parsed->n_heads % parsed->n_kv_heads, 0) << changed;
      ASSERT_EQ(rope_inv_freq(*parsed).size(), static_cast<std::size_t>(parsed->head_dim) / 2);
      for (const float f : rope_inv_freq(*parsed)) ASSERT_TRUE(f > 0 && f <= 1.0f) << changed;
    }
    std::string other = generation;
    mutate_json(random, other);
    const auto defaults = parse_generation_config(other);
    if (!defaults.ok() || !defaults->top_p) continue;
    ASSERT_TRUE(*defaults->top_p > 0 && *defaults->top_p <= 1);
  }
  EXPECT_GT(accepted, kMutations / 50);
}

// A whole tiny checkpoint with a damaged header must never load with other shapes than asked for.
TEST(HostileFiles, MutatedCheckpointLoads) {
  SCOPED_TRACE("seed " + std::to_string(kSeed));
  Random random(kSeed);
  const TempDir dir;
  const auto config = parse_model_config(tiny_config(true));
  ASSERT_TRUE(config.ok());
  const std::vector<FileTensor> tensors = tiny_tensors(DType::kBF16, true);
  const std::string header = safetensors_header(tensors);
  const std::string data = safetensors_file(tensors).substr(8 + header.size());
  for (int i = 0; i < kMutations / 8; ++i) {
    std::string changed = header;
    mutate_json(random, changed);
    dir.write("model.safetensors", safetensors_bytes(changed, data));
    const auto checkpoint = Checkpoint::open(dir.path());
    if (!checkpoint.ok()) continue;
    const auto stage = load_llama_stage(*checkpoint, *config, {0, 2}, true, true);
    if (!stage.ok()) continue;
    ASSERT_EQ(stage->layers[1].down_proj.shape, (std::vector<std::int64_t>{8, 12})) << changed;
    ASSERT_EQ(stage->layers[1].down_proj.data.bytes().size(),
              8 * 12 * dtype_bytes(stage->layers[1].down_proj.dtype));
  }
}

}  // namespace
}  // namespace spindle::model
