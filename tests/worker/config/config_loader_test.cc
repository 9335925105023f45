#include "worker/config/config_loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <string>

#include "tests/worker/config/config_files.h"

namespace spindle::config {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

TEST(ConfigLoader, ReadsEveryKindOfField) {
  const auto config = parse_config_text(
      "# a comment\n"
      "model { path: \"m\" load_format: DUMMY use_generation_config: false }\n"
      "cluster { layers_per_stage: [5, 7] }\n"
      "kv { memory_bytes: 5000000000 }\n"
      "scheduler { seed: 18446744073709551615 }\n"
      "api { api_key: \"a\" api_key: \"b\" }\n",
      "c.pbtxt");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->model().path(), "m");
  EXPECT_EQ(config->model().load_format(), Model::DUMMY);
  EXPECT_FALSE(config->model().use_generation_config());
  EXPECT_THAT(config->cluster().layers_per_stage(), testing::ElementsAre(5, 7));
  EXPECT_THAT(config->kv().memory_bytes(), testing::ElementsAre(5000000000));
  EXPECT_EQ(config->scheduler().seed(), 18446744073709551615U);
  EXPECT_THAT(config->api().api_key(), testing::ElementsAre("a", "b"));
}

TEST(ConfigLoader, EmptyTextIsAnEmptyConfig) {
  const auto config = parse_config_text("", "c.pbtxt");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->ByteSizeLong(), 0U);
}

struct BadText {
  const char* text;
  const char* message_start;
  const char* message_part;
};

class BadConfigText : public testing::TestWithParam<BadText> {};

TEST_P(BadConfigText, NamesFileLineAndColumn) {
  const auto config = parse_config_text(GetParam().text, "c.pbtxt");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(config.status().message(), StartsWith(GetParam().message_start));
  EXPECT_THAT(config.status().message(), HasSubstr(GetParam().message_part));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadConfigText,
    testing::Values(
        // An unknown field, on its own line.
        BadText{"api {\n  http {\n    prot: 1\n  }\n}\n", "c.pbtxt:3:5: ", "\"prot\""},
        // An unknown group.
        BadText{"\n\nserver { }\n", "c.pbtxt:3:1: ", "\"server\""},
        // A wrong type.
        BadText{"api {\n  http {\n    port: \"8000\"\n  }\n}\n", "c.pbtxt:3:11: ", "nteger"},
        BadText{"api { http { enabled: 7 } }", "c.pbtxt:1:", "7"},
        BadText{"model { path: 3 }", "c.pbtxt:1:15: ", "string"},
        // An enum value that does not exist.
        BadText{"kv {\n  dtype: F8\n}\n", "c.pbtxt:2:10: ", "F8"},
        BadText{"kv { dtype: F8", "c.pbtxt:1:13: ", "F8"},
        // Out of the type's range.
        BadText{"scheduler { max_num_seqs: 3000000000 }", "c.pbtxt:1:27: ", "out of range"},
        // Set twice.
        BadText{"kv { dtype: F16 dtype: F32 }", "c.pbtxt:1:17: ", "multiple times"},
        // Not closed.
        BadText{"api { http { port: 1 }", "c.pbtxt:1:", "Expected"},
        // Not text format at all.
        BadText{"{\"api\": 1}", "c.pbtxt:1:1: ", "Expected"}));

TEST(ConfigLoader, PointsAtTheColumnOfAnUnknownField) {
  const auto config = parse_config_text("kv {\n  dtyp: F16\n}\n", "c.pbtxt");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().message(),
            "c.pbtxt:2:3: Message type \"spindle.config.Kv\" has no field named \"dtyp\".");
}

TEST(ConfigLoader, DeepNestingIsRefused) {
  std::string text;
  for (int i = 0; i < 100000; ++i) text += "api {";
  EXPECT_FALSE(parse_config_text(text, "c.pbtxt").ok());
}

TEST(ConfigLoader, RelativeModelPathIsTakenFromTheFilesFolder) {
  const TemporaryFolder folder;
  const auto file = folder.write("configs/c.pbtxt", "model { path: \"../models/m/\" }");
  const auto config = load_config_file(file);
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->model().path(), (folder.path() / "models/m").string());
}

TEST(ConfigLoader, RelativeProfileTableIsTakenFromTheFilesFolder) {
  const TemporaryFolder folder;
  const auto config =
      load_config_file(folder.write("c.pbtxt", "kv { profile_table: \"profiles/m.pbtxt\" }"));
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->kv().profile_table(), (folder.path() / "profiles/m.pbtxt").string());
}

TEST(ConfigLoader, AbsoluteModelPathStays) {
  const TemporaryFolder folder;
  const auto config = load_config_file(folder.write("c.pbtxt", "model { path: \"/data/m\" }"));
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->model().path(), "/data/m");
}

TEST(ConfigLoader, MissingFile) {
  const TemporaryFolder folder;
  const auto config = load_config_file(folder.path() / "none.pbtxt");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kNotFound);
  EXPECT_THAT(config.status().message(), HasSubstr("none.pbtxt"));
}

TEST(ConfigLoader, DirectoryAndPipeAreRefused) {
  const TemporaryFolder folder;
  EXPECT_THAT(load_config_file(folder.path()).status().message(), HasSubstr("is a directory"));
  const std::string pipe = (folder.path() / "pipe").string();
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THAT(load_config_file(pipe).status().message(), HasSubstr("not a regular file"));
}

TEST(ConfigLoader, HugeFileIsRefusedAndTheLargestIsRead) {
  const TemporaryFolder folder;
  std::string text = "kv { dtype: F32 }\n#";
  text.resize(kMaxConfigFileBytes, 'x');
  EXPECT_TRUE(load_config_file(folder.write("fits.pbtxt", text)).ok());
  const auto config = load_config_file(folder.write("huge.pbtxt", text + "x"));
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), StatusCode::kTooLarge);
}

TEST(ConfigLoader, ErrorsOfAFileBeginWithItsPath) {
  const TemporaryFolder folder;
  const auto file = folder.write("c.pbtxt", "\nport: 1\n");
  EXPECT_THAT(load_config_file(file).status().message(), StartsWith(file.string() + ":2:"));
}

TEST(ConfigLoader, AbsolutePaths) {
  EXPECT_EQ(absolute_path("m", "/a/b"), "/a/b/m");
  EXPECT_EQ(absolute_path("../m/", "/a/b"), "/a/m");
  EXPECT_EQ(absolute_path("/m/./x//", "/a/b"), "/m/x");
  EXPECT_EQ(absolute_path(".", "/a/b"), "/a/b");
}

}  // namespace
}  // namespace spindle::config
