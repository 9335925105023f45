#include "worker/model/regular_file.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <array>
#include <filesystem>

#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

using ::testing::HasSubstr;

TEST(RegularFile, ReadsAnyRange) {
  const TempDir dir;
  const auto file = RegularFile::open(dir.write("a", "abcdef"));
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_EQ(file->size_bytes(), 6u);
  std::array<std::byte, 3> bytes{};
  ASSERT_TRUE(file->read_at(2, bytes).ok());
  EXPECT_EQ(static_cast<char>(bytes[0]), 'c');
  EXPECT_EQ(static_cast<char>(bytes[2]), 'e');
  EXPECT_TRUE(file->read_at(3, bytes).ok());
  EXPECT_FALSE(file->read_at(4, bytes).ok());
  EXPECT_FALSE(file->read_at(~std::uint64_t{0}, bytes).ok());
  EXPECT_TRUE(file->read_at(6, {}).ok());
}

TEST(RegularFile, ShrinkingFileFailsTheRead) {
  const TempDir dir;
  const auto path = dir.write("a", "abcdef");
  const auto file = RegularFile::open(path);
  ASSERT_TRUE(file.ok());
  std::filesystem::resize_file(path, 4);
  std::array<std::byte, 6> bytes{};
  const Status status = file->read_at(0, bytes);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("ended at byte 4"));
}

TEST(RegularFile, RefusesWhatIsNotARegularFile) {
  const TempDir dir;
  std::filesystem::create_directory(dir.path() / "folder");
  ASSERT_EQ(mkfifo((dir.path() / "fifo").c_str(), 0600), 0);
  for (const char* name : {"folder", "fifo"}) {
    const auto file = RegularFile::open(dir.path() / name);  // must not wait for a writer
    ASSERT_FALSE(file.ok());
    EXPECT_EQ(file.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(file.status().message(), HasSubstr("not a regular file"));
  }
  EXPECT_FALSE(RegularFile::open("/dev/null").ok());
  EXPECT_EQ(RegularFile::open(dir.path() / "nothing").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(RegularFile::open(dir.path() / "fifo" / "x").status().code(), StatusCode::kNotFound);
}

TEST(RegularFile, FollowsSymbolicLinks) {
  const TempDir dir;
  dir.write("blob", "xyz");
  std::filesystem::create_symlink("blob", dir.path() / "link");
  std::filesystem::create_symlink("loop", dir.path() / "loop");
  EXPECT_TRUE(RegularFile::open(dir.path() / "link").ok());
  EXPECT_FALSE(RegularFile::open(dir.path() / "loop").ok());
}

TEST(ReadTextFile, KeepsToTheLimit) {
  const TempDir dir;
  const auto path = dir.write("a", "12345");
  EXPECT_EQ(read_text_file(path, 5).value(), "12345");
  EXPECT_EQ(read_text_file(path, 4).status().code(), StatusCode::kTooLarge);
  EXPECT_EQ(read_text_file(dir.write("empty", ""), 4).value(), "");
}

}  // namespace
}  // namespace spindle::model
