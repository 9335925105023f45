#include "worker/model/checkpoint.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr const char* kIndex = "model.safetensors.index.json";

void write_two_shards(const TempDir& dir) {
  const FileTensor a = counting_tensor("a", DType::kF32, {2}, 8);
  const FileTensor b = counting_tensor("b", DType::kF32, {3}, 16);
  const FileTensor c = counting_tensor("c", DType::kF32, {1}, 24);
  dir.write("one.safetensors", safetensors_file(std::vector{a, c}));
  dir.write("two.safetensors", safetensors_file(std::vector{b}));
  dir.write(
      kIndex,
      index_json({{"a", "one.safetensors"}, {"b", "two.safetensors"}, {"c", "one.safetensors"}}));
}

TEST(Checkpoint, OpensShardsOnlyWhenAsked) {
  const TempDir dir;
  write_two_shards(dir);
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  EXPECT_THAT(checkpoint->names(), ElementsAre("a", "b", "c"));
  EXPECT_TRUE(checkpoint->contains("b"));
  EXPECT_FALSE(checkpoint->contains("d"));
  EXPECT_THAT(checkpoint->opened_shards(), IsEmpty());

  const auto b = checkpoint->find("b");
  ASSERT_TRUE(b.ok()) << b.status().to_string();
  EXPECT_THAT(checkpoint->opened_shards(), ElementsAre("two.safetensors"));
  EXPECT_EQ(checkpoint->bytes_read(), 0u);
  std::vector<float> values(2);
  ASSERT_TRUE(checkpoint->read_bytes(*b, 4, std::as_writable_bytes(std::span(values))).ok());
  EXPECT_THAT(values, ElementsAre(17 / 8.0f, 18 / 8.0f));
  EXPECT_EQ(checkpoint->bytes_read(), 8u);
  EXPECT_FALSE(checkpoint->read_bytes(*b, 8, std::as_writable_bytes(std::span(values))).ok());
  EXPECT_EQ(checkpoint->bytes_read(), 8u);
  EXPECT_EQ(checkpoint->find("d").status().code(), StatusCode::kNotFound);
}

TEST(Checkpoint, SingleFile) {
  const TempDir dir;
  dir.write("model.safetensors",
            safetensors_file(std::vector{counting_tensor("z", DType::kF16, {2}, 0),
                                         counting_tensor("y", DType::kF16, {2}, 0)}));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_THAT(checkpoint->names(), ElementsAre("y", "z"));
  EXPECT_TRUE(checkpoint->find("z").ok());
}

TEST(Checkpoint, MissingFiles) {
  const TempDir dir;
  dir.write("pytorch_model.bin", "x");
  for (const auto& path : {dir.path(), dir.path() / "none"}) {
    const auto checkpoint = Checkpoint::open(path);
    ASSERT_FALSE(checkpoint.ok());
    EXPECT_EQ(checkpoint.status().code(), StatusCode::kNotFound);
    EXPECT_THAT(checkpoint.status().message(), HasSubstr("nor model.safetensors"));
  }
}

TEST(Checkpoint, ShardProblemsAreNamed) {
  const TempDir dir;
  write_two_shards(dir);
  std::filesystem::remove(dir.path() / "two.safetensors");
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_TRUE(checkpoint->find("a").ok());
  EXPECT_EQ(checkpoint->find("b").status().code(), StatusCode::kNotFound);
  EXPECT_THAT(checkpoint->find("b").status().message(), HasSubstr("two.safetensors"));

  std::filesystem::create_directory(dir.path() / "two.safetensors");
  EXPECT_THAT(checkpoint->find("b").status().message(), HasSubstr("not a regular file"));
  std::filesystem::remove(dir.path() / "two.safetensors");
  ASSERT_EQ(mkfifo((dir.path() / "two.safetensors").c_str(), 0600), 0);
  EXPECT_THAT(checkpoint->find("b").status().message(), HasSubstr("not a regular file"));
}

TEST(Checkpoint, TensorOfTheIndexMustBeInItsShard) {
  const TempDir dir;
  write_two_shards(dir);
  dir.write(kIndex, index_json({{"a", "one.safetensors"}, {"x", "one.safetensors"}}));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  const auto tensor = checkpoint->find("a");
  ASSERT_FALSE(tensor.ok());
  EXPECT_THAT(tensor.status().message(),
              HasSubstr("\"one.safetensors\" does not hold tensor \"x\""));
}

TEST(Checkpoint, UnlistedTensorsAreKnown) {
  const TempDir dir;
  write_two_shards(dir);
  dir.write(kIndex, index_json({{"a", "one.safetensors"}, {"b", "two.safetensors"}}));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_TRUE(checkpoint->find("b").ok());
  EXPECT_THAT(checkpoint->unlisted_names(), IsEmpty());
  EXPECT_TRUE(checkpoint->find("a").ok());
  EXPECT_THAT(checkpoint->unlisted_names(), ElementsAre("c"));
}

TEST(Checkpoint, RefusesFileNamesThatLeadElsewhere) {
  const TempDir dir;
  for (const std::string name :
       {"../x.safetensors", "..safetensors", "a/x.safetensors", "/etc/x.safetensors",
        "a\\\\x.safetensors", "x\\u0000.safetensors", "x\\n.safetensors", "", ".safetensors",
        "x.bin", "a..safetensors", "x.safetensors/", "x.safetensors\\u0000"}) {
    dir.write(kIndex, index_json({{"a", name}}));
    const auto checkpoint = Checkpoint::open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << name;
    EXPECT_THAT(checkpoint.status().message(), HasSubstr("is not a plain *.safetensors name"));
  }
  dir.write(kIndex, index_json({{"a", std::string(300, 'x') + ".safetensors"}}));
  EXPECT_FALSE(Checkpoint::open(dir.path()).ok());
}

TEST(Checkpoint, RefusesBadIndexes) {
  struct Case {
    std::string text;
    std::string_view message;
  };
  const TempDir dir;
  for (const Case& bad : std::vector<Case>{
           {"", "not valid JSON"},
           {"[]", "not a JSON object"},
           {"1", "not a JSON object"},
           {"\"x\"", "not a JSON object"},
           {"{}", "\"weight_map\" is missing"},
           {R"({"weight_map":[]})", "must map tensor names"},
           {R"({"weight_map":"x"})", "must map tensor names"},
           {R"({"weight_map":null})", "must map tensor names"},
           {R"({"weight_map":{"a":1}})", "must map tensor names"},
           {R"({"weight_map":{"a":{"b":"c"}}})", "must map tensor names"},
           {R"({"weight_map":{"a":["b"]}})", "must map tensor names"},
           {R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})", "\"a\" occurs twice"},
           {R"({"weight_map":{},"weight_map":{}})", "\"weight_map\" occurs twice"},
           {R"({"weight_map":{")" + std::string(513, 'a') + R"(":"x.safetensors"}})",
            "longer than 512"},
           {R"({"metadata":)" + std::string(100'000, '['), "deeper than 8"},
           {"{\"weight_map\":{\"\xff\":\"x.safetensors\"}}", "not valid JSON"},
       }) {
    dir.write(kIndex, bad.text);
    const auto checkpoint = Checkpoint::open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << bad.text;
    EXPECT_THAT(checkpoint.status().message(), HasSubstr(std::string(bad.message)));
    EXPECT_THAT(checkpoint.status().message(), HasSubstr(kIndex));
  }
  std::filesystem::resize_file(dir.path() / kIndex, kMaxIndexBytes + 1);
  EXPECT_EQ(Checkpoint::open(dir.path()).status().code(), StatusCode::kTooLarge);
}

TEST(Checkpoint, AnyMetadataIsAllowed) {
  const TempDir dir;
  dir.write(kIndex, R"({"metadata":{"total_size":1.5,"x":[true,null,{"weight_map":-1}]},
                        "weight_map":{},"more":"text"})");
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  EXPECT_THAT(checkpoint->names(), IsEmpty());
}

TEST(Checkpoint, IndexInsteadOfAFileMayBeAFolderOrPipe) {
  const TempDir dir;
  std::filesystem::create_directory(dir.path() / kIndex);
  EXPECT_EQ(Checkpoint::open(dir.path()).status().code(), StatusCode::kInvalidArgument);
  std::filesystem::remove(dir.path() / kIndex);
  ASSERT_EQ(mkfifo((dir.path() / kIndex).c_str(), 0600), 0);
  EXPECT_EQ(Checkpoint::open(dir.path()).status().code(), StatusCode::kInvalidArgument);
}

TEST(Checkpoint, ManyThreadsReadAtOnce) {
  const TempDir dir;
  write_two_shards(dir);
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok());
  std::vector<std::thread> threads;
  std::vector<int> good(4);
  for (int& n : good) {
    threads.emplace_back([&] {
      for (int i = 0; i < 100; ++i) {
        const auto tensor = checkpoint->find(i % 2 == 0 ? "a" : "b");
        std::array<std::byte, 8> bytes{};
        if (tensor.ok() && checkpoint->read_bytes(*tensor, 0, bytes).ok()) ++n;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(good, ElementsAre(100, 100, 100, 100));
  EXPECT_EQ(checkpoint->bytes_read(), 4u * 100 * 8);
  EXPECT_THAT(checkpoint->opened_shards(), SizeIs(2));
}

}  // namespace
}  // namespace spindle::model
