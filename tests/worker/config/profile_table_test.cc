#include "worker/config/profile_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/worker/config/config_files.h"

namespace spindle::config {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

std::string head(int layer, int kv_head, const std::string& extra = "") {
  return "head { layer: " + std::to_string(layer) + " kv_head: " + std::to_string(kv_head) +
         " k_bits: [0.4, 0.3, 0.2, 0.1] v_bits: [8, 4, 2, 1] int4: 0.01 codebook: 0 "
         "codebook_k_entries: 0.5 codebook_v_entries: 1 window64: 3 window256: " +
         std::to_string(10 * layer + kv_head) + " " + extra + "}\n";
}

// Two layers with two KV heads, not in order.
std::string table() {
  return "model: \"some-model\" n_layers: 2 n_kv_heads: 2\n" + head(1, 0) + head(0, 1) +
         head(0, 0) + head(1, 1);
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(ProfileTable, ReadsEveryFieldInTheModelsOrder) {
  const auto read = parse_profile_table(table(), "t", 2, 2);
  ASSERT_TRUE(read.ok()) << read.status().to_string();
  EXPECT_EQ(read->model, "some-model");
  ASSERT_EQ(read->heads.size(), 4U);
  EXPECT_EQ(read->heads[0].window256, 0);
  EXPECT_EQ(read->heads[1].window256, 1);
  EXPECT_EQ(read->heads[2].window256, 10);
  EXPECT_EQ(read->heads[3].window256, 11);
  const kvstore::HeadErrors& errors = read->heads[3];
  EXPECT_THAT(errors.k_bits, ElementsAre(0.4, 0.3, 0.2, 0.1));
  EXPECT_THAT(errors.v_bits, ElementsAre(8, 4, 2, 1));
  EXPECT_EQ(errors.int4, 0.01);
  EXPECT_EQ(errors.codebook, 0);
  EXPECT_EQ(errors.codebook_k_entries, 0.5);
  EXPECT_EQ(errors.codebook_v_entries, 1);
  EXPECT_EQ(errors.window64, 3);
}

TEST(ProfileTable, ReadsAFile) {
  const TemporaryFolder folder;
  const auto path = folder.write("t.pbtxt", table());
  EXPECT_TRUE(load_profile_table(path, 2, 2).ok());
  EXPECT_EQ(load_profile_table(folder.path() / "none", 2, 2).status().code(),
            StatusCode::kNotFound);
  EXPECT_EQ(load_profile_table(folder.path(), 2, 2).status().code(), StatusCode::kInvalidArgument);
  const auto large = folder.write("large", std::string(kMaxProfileTableBytes + 1, '#'));
  EXPECT_EQ(load_profile_table(large, 2, 2).status().code(), StatusCode::kTooLarge);
  const auto bad = folder.write("bad.pbtxt", "n_layers: 2\nn_heads: 1\n");
  EXPECT_THAT(load_profile_table(bad, 2, 2).status().message(), StartsWith(bad.string() + ":2:1:"));
}

struct BadTable {
  std::string name;
  std::string text;
  std::string message;
};

class BadTables : public testing::TestWithParam<BadTable> {};

TEST_P(BadTables, AreRefused) {
  const auto read = parse_profile_table(GetParam().text, "t", 2, 2);
  ASSERT_FALSE(read.ok());
  EXPECT_EQ(read.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(read.status().message(), StartsWith("t"));
  EXPECT_THAT(read.status().message(), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadTables,
    testing::Values(
        BadTable{"empty", "", "n_layers and n_kv_heads must be set"},
        BadTable{"layers", replaced(table(), "n_layers: 2", "n_layers: 3"),
                 "for 3 layers with 2 KV heads, the model has 2 with 2"},
        BadTable{"heads", replaced(table(), "n_kv_heads: 2", "n_kv_heads: -1"), "-1 KV heads"},
        BadTable{"missing", replaced(table(), head(0, 1), ""),
                 "head { layer: 0 kv_head: 1 } is missing"},
        BadTable{"twice", table() + head(1, 1), "head { layer: 1 kv_head: 1 } is there twice"},
        BadTable{"layer_outside", table() + head(2, 0), "layer: 2 kv_head: 0 } is not in the"},
        BadTable{"layer_below", table() + head(-1, 0), "is not in the model"},
        BadTable{"head_outside", table() + head(0, 2), "is not in the model"},
        BadTable{"nameless", replaced(table(), "layer: 1 ", ""), "without layer or kv_head"},
        BadTable{"bits", replaced(table(), "[0.4, 0.3, 0.2, 0.1]", "[1, 2, 3]"),
                 "k_bits must have 4 values, got 3"},
        BadTable{"more_bits", replaced(table(), "[8, 4, 2, 1]", "[1, 2, 3, 4, 5]"),
                 "v_bits must have 4 values, got 5"},
        BadTable{"unset", replaced(table(), "window64: 3 ", ""),
                 "head { layer: 1 kv_head: 0 }: window64 is not set"},
        BadTable{"negative", replaced(table(), "int4: 0.01", "int4: -0.01"),
                 "int4 must be finite and not negative"},
        BadTable{"nan", replaced(table(), "codebook: 0 ", "codebook: nan "),
                 "codebook must be finite"},
        BadTable{"infinite", replaced(table(), "0.3", "inf"), "k_bits must be finite"},
        BadTable{"entries", replaced(table(), "codebook_k_entries: 0.5", "codebook_k_entries: 0"),
                 "codebook_k_entries must be above 0"},
        BadTable{"many_entries",
                 replaced(table(), "codebook_v_entries: 1", "codebook_v_entries: 1.5"),
                 "codebook_v_entries must be above 0 and at most 1"},
        BadTable{"unknown", table() + "n_heads: 2", "t:6:1:"}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace spindle::config
