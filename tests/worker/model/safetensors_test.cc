#include "worker/model/safetensors.h"

#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/worker/model/model_files.h"

namespace spindle::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string text_of(const SafetensorsFile& file, const TensorInfo& tensor) {
  std::string text(tensor.n_bytes(), '\0');
  const Status status = file.read(tensor, std::as_writable_bytes(std::span(text)));
  return status.ok() ? text : status.to_string();
}

// One byte-typed tensor entry without the surrounding braces.
std::string entry(const std::string& name, const std::string& shape, const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":"U8","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}";
}

TEST(Safetensors, ReadsByName) {
  const TempDir dir;
  const std::string header = "{" + entry("b", "[2,3]", "[0,6]") + "," +
                             entry("a", "[4]", "[6,10]") + R"(,"__metadata__":{"format":"pt"}}   )";
  const auto file = SafetensorsFile::open(dir.write("x", safetensors_bytes(header, "bbbbBBaaaa")));
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  ASSERT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->tensors()[0].name, "b");
  EXPECT_THAT(file->tensors()[0].shape, ElementsAre(2, 3));
  EXPECT_EQ(file->tensors()[0].dtype, FileDType::kU8);
  ASSERT_NE(file->find("a"), nullptr);
  EXPECT_EQ(text_of(*file, *file->find("a")), "aaaa");
  EXPECT_EQ(text_of(*file, *file->find("b")), "bbbbBB");
  EXPECT_EQ(file->find("c"), nullptr);
  EXPECT_EQ(file->find("__metadata__"), nullptr);
}

TEST(Safetensors, ReadsRowsAndRanges) {
  const TempDir dir;
  const auto file = SafetensorsFile::open(
      dir.write("x", safetensors_bytes("{" + entry("t", "[4,2]", "[0,8]") + "}", "00112233")));
  ASSERT_TRUE(file.ok());
  const TensorInfo& tensor = *file->find("t");
  std::string out(4, '\0');
  const auto bytes = std::as_writable_bytes(std::span(out));
  ASSERT_TRUE(file->read_rows(tensor, 1, 2, bytes).ok());
  EXPECT_EQ(out, "1122");
  ASSERT_TRUE(file->read_range(tensor, 3, bytes).ok());
  EXPECT_EQ(out, "1223");
  EXPECT_TRUE(file->read_rows(tensor, 4, 0, {}).ok());
  EXPECT_FALSE(file->read_rows(tensor, 3, 2, bytes).ok());
  EXPECT_FALSE(file->read_rows(tensor, -1, 2, bytes).ok());
  EXPECT_FALSE(file->read_rows(tensor, 0, 3, bytes).ok());  // out is too small
  EXPECT_FALSE(file->read_range(tensor, 5, bytes).ok());
  EXPECT_FALSE(file->read_range(tensor, ~std::uint64_t{0}, bytes).ok());
  EXPECT_FALSE(file->read(tensor, bytes).ok());
}

TEST(Safetensors, EmptyTensorsScalarsAndEmptyFiles) {
  const TempDir dir;
  const std::string header = "{" + entry("none", "[0,7]", "[0,0]") + "," +
                             entry("scalar", "[]", "[0,1]") + "," +
                             entry("last", "[3,0]", "[1,1]") + "}";
  const auto file = SafetensorsFile::open(dir.write("x", safetensors_bytes(header, "s")));
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_EQ(text_of(*file, *file->find("scalar")), "s");
  EXPECT_EQ(text_of(*file, *file->find("none")), "");
  EXPECT_TRUE(file->read_rows(*file->find("none"), 0, 0, {}).ok());
  EXPECT_TRUE(SafetensorsFile::open(dir.write("y", safetensors_bytes("{}", ""))).ok());
}

TEST(Safetensors, EveryDType) {
  struct Case {
    std::string_view name;
    int bits;
  };
  const TempDir dir;
  for (const Case& dtype :
       {Case{"BOOL", 8},    Case{"F4", 4},   Case{"F6_E2M3", 6}, Case{"F6_E3M2", 6},
        Case{"U8", 8},      Case{"I8", 8},   Case{"F8_E5M2", 8}, Case{"F8_E4M3", 8},
        Case{"F8_E8M0", 8}, Case{"I16", 16}, Case{"U16", 16},    Case{"F16", 16},
        Case{"BF16", 16},   Case{"I32", 32}, Case{"U32", 32},    Case{"F32", 32},
        Case{"C64", 64},    Case{"F64", 64}, Case{"I64", 64},    Case{"U64", 64}}) {
    const int n_bytes = 4 * dtype.bits / 8;
    const std::vector<FileTensor> tensors = {{"t",
                                              std::string(dtype.name),
                                              {2, 2},
                                              std::string(static_cast<std::size_t>(n_bytes), 'x')}};
    const auto file = SafetensorsFile::open(dir.write("x", safetensors_file(tensors)));
    ASSERT_TRUE(file.ok()) << file.status().to_string();
    EXPECT_EQ(file_dtype_name(file->tensors()[0].dtype), dtype.name);
    const bool usable = dtype.name == "F16" || dtype.name == "BF16" || dtype.name == "F32";
    EXPECT_EQ(weight_dtype(file->tensors()[0].dtype).has_value(), usable) << dtype.name;
  }
}

struct BadFile {
  std::string what;
  std::string header;
  std::string data;
  std::string message;
};

TEST(Safetensors, RefusesBadHeaders) {
  const std::string name512(512, 'n');
  const std::string nine = "[1,1,1,1,1,1,1,1,1]";
  const std::vector<BadFile> cases = {
      {"not an object", "[1]", "", "does not begin with"},
      {"leading space", " {}", "", "does not begin with"},
      {"empty header", "", "", "not valid JSON"},
      {"cut JSON", "{\"a\":", "", "not valid JSON"},
      {"two documents", "{}{}", "", "not valid JSON"},
      {"invalid UTF-8", "{" + entry("a\xff", "[1]", "[0,1]") + "}", "x", "not valid JSON"},
      {"overlong UTF-8", "{" + entry("\xc0\xaf", "[1]", "[0,1]") + "}", "x", "not valid JSON"},
      {"lone surrogate", "{" + entry("\\ud800", "[1]", "[0,1]") + "}", "x", "not valid JSON"},
      {"long name", "{" + entry(name512 + "n", "[1]", "[0,1]") + "}", "x", "longer than 512"},
      {"duplicate name", "{" + entry("a", "[1]", "[0,1]") + "," + entry("a", "[1]", "[1,2]") + "}",
       "xy", "\"a\" occurs twice"},
      {"duplicate by escape",
       "{" + entry("a", "[1]", "[0,1]") + "," + entry("\\u0061", "[1]", "[1,2]") + "}", "xy",
       "\"a\" occurs twice"},
      {"duplicate empty tensor",
       "{" + entry("a", "[0]", "[0,0]") + "," + entry("a", "[0]", "[0,0]") + "}", "",
       "\"a\" occurs twice"},
      {"duplicate field", R"({"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}})",
       "x", "\"dtype\" occurs twice"},
      {"duplicate metadata", R"({"__metadata__":{},"__metadata__":{}})", "", "occurs twice"},
      {"duplicate metadata key", R"({"__metadata__":{"k":"a","k":"b"}})", "", "\"k\" occurs twice"},
      {"metadata number", R"({"__metadata__":{"k":1}})", "", "must map names to strings"},
      {"metadata list", R"({"__metadata__":["k"]})", "", "must map names to strings"},
      {"metadata nested", R"({"__metadata__":{"k":{}}})", "", "must map names to strings"},
      {"tensor is a number", R"({"a":1})", "", "must be an object"},
      {"tensor is null", R"({"a":null})", "", "must be an object"},
      {"no dtype", R"({"a":{"shape":[],"data_offsets":[0,1]}})", "x", "\"dtype\" is missing"},
      {"no shape", R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", "x", "\"shape\" is missing"},
      {"no offsets", R"({"a":{"dtype":"U8","shape":[]}})", "x", "\"data_offsets\" is missing"},
      {"unknown field", R"({"a":{"stride":[1]}})", "", "unknown field \"stride\""},
      {"unknown dtype", R"({"a":{"dtype":"BF17"}})", "", "unknown dtype \"BF17\""},
      {"long dtype", R"({"a":{"dtype":")" + std::string(5000, 'B') + "\"}}", "", "unknown dtype"},
      {"dtype number", R"({"a":{"dtype":16}})", "", "must be a string"},
      {"rank 9", "{" + entry("a", nine, "[0,1]") + "}", "x", "more than 8 dimensions"},
      {"negative size", "{" + entry("a", "[-1]", "[0,1]") + "}", "x", "a negative number"},
      {"fractional size", "{" + entry("a", "[1.0]", "[0,1]") + "}", "x", "not a 64-bit integer"},
      {"size over 63 bits", "{" + entry("a", "[18446744073709551615]", "[0,1]") + "}", "x",
       "too large"},
      {"size over 64 bits", "{" + entry("a", "[18446744073709551616]", "[0,1]") + "}", "x",
       "not a 64-bit integer"},
      {"product wraps to 1 byte", "{" + entry("a", "[4294967296,4294967296]", "[0,0]") + "}", "",
       "an impossible number"},
      {"product wraps then zero", "{" + entry("a", "[4294967296,4294967296,0]", "[0,0]") + "}", "",
       "an impossible number"},
      {"half a byte", R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}})", "x",
       "an impossible number"},
      {"size mismatch", "{" + entry("a", "[3]", "[0,4]") + "}", "xxxx", "needs 3"},
      {"reversed offsets", "{" + entry("a", "[1]", "[1,0]") + "}", "x", "end before they begin"},
      {"three offsets", "{" + entry("a", "[1]", "[0,1,2]") + "}", "x", "must be two numbers"},
      {"one offset", "{" + entry("a", "[1]", "[0]") + "}", "x", "must be two numbers"},
      {"string offset", "{" + entry("a", "[1]", "[\"0\",1]") + "}", "x", "must be two numbers"},
      {"overlap", "{" + entry("a", "[2]", "[0,2]") + "," + entry("b", "[2]", "[1,3]") + "}", "xxx",
       "\"b\" begins at byte 1, overlapping tensor \"a\", which ends at 2"},
      {"same range", "{" + entry("a", "[2]", "[0,2]") + "," + entry("b", "[2]", "[0,2]") + "}",
       "xx", "overlapping"},
      {"gap", "{" + entry("a", "[1]", "[0,1]") + "," + entry("b", "[1]", "[2,3]") + "}", "xxx",
       "a gap after tensor \"a\""},
      {"gap at the start", "{" + entry("a", "[1]", "[1,2]") + "}", "xx", "a gap after the header"},
      {"bytes left over", "{" + entry("a", "[1]", "[0,1]") + "}", "xx", "2 follow the header"},
      {"bytes missing", "{" + entry("a", "[3]", "[0,3]") + "}", "xx", "cover 3 bytes, but 2"},
      {"far offsets", "{" + entry("a", "[1]", "[18446744073709551614,18446744073709551615]") + "}",
       "x", "a gap after the header"},
      {"nested list", "{" + entry("a", "[[1]]", "[0,1]") + "}", "x", "found a list"},
      {"deep list", "{" + entry("a", "[[[1]]]", "[0,1]") + "}", "x", "found a list"},
      {"deep metadata", R"({"__metadata__":)" + std::string(100'000, '{'), "", "not valid JSON"},
      {"deep start", "{" + std::string(100'000, '['), "", "not valid JSON"},
  };
  const TempDir dir;
  for (const BadFile& bad : cases) {
    const auto file =
        SafetensorsFile::open(dir.write("bad", safetensors_bytes(bad.header, bad.data)));
    ASSERT_FALSE(file.ok()) << bad.what;
    EXPECT_THAT(file.status().message(), HasSubstr(bad.message)) << bad.what;
    EXPECT_LT(file.status().message().size(), 500u) << bad.what;
  }
}

TEST(Safetensors, NameOf512BytesIsAllowed) {
  const TempDir dir;
  const std::string header = "{" + entry(std::string(512, 'n'), "[1]", "[0,1]") + "}";
  EXPECT_TRUE(SafetensorsFile::open(dir.write("x", safetensors_bytes(header, "x"))).ok());
  const std::string rank8 = "{" + entry("a", "[1,1,1,1,1,1,1,1]", "[0,1]") + "}";
  EXPECT_TRUE(SafetensorsFile::open(dir.write("x", safetensors_bytes(rank8, "x"))).ok());
}

TEST(Safetensors, RefusesBadHeaderLength) {
  const TempDir dir;
  const auto open = [&](std::uint64_t length, std::string_view rest) {
    return SafetensorsFile::open(dir.write("x", safetensors_bytes(rest, "", length))).status();
  };
  EXPECT_EQ(open(~std::uint64_t{0}, "{}").code(), StatusCode::kTooLarge);
  EXPECT_EQ(open(100'000'001, "{}").code(), StatusCode::kTooLarge);
  EXPECT_EQ(open(100'000'000, "{}").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(open(3, "{}").code(), StatusCode::kInvalidArgument);
  EXPECT_FALSE(open(1, "{}").ok());
  EXPECT_TRUE(open(2, "{}").ok());
  EXPECT_FALSE(SafetensorsFile::open(dir.write("x", "")).ok());
  EXPECT_FALSE(SafetensorsFile::open(dir.write("x", "\x02\0\0\0\0\0\0")).ok());
}

TEST(Safetensors, RefusesTooManyTensors) {
  const TempDir dir;
  const auto open = [&](std::size_t n) {
    std::string header = "{";
    for (std::size_t i = 0; i < n; ++i) {
      header += (i == 0 ? "" : ",") + entry(std::to_string(i), "[0]", "[0,0]");
    }
    return SafetensorsFile::open(dir.write("x", safetensors_bytes(header + "}", ""))).status();
  };
  EXPECT_TRUE(open(65'536).ok());
  EXPECT_EQ(open(65'537).code(), StatusCode::kTooLarge);
}

long peak_rss_kib() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

TEST(Safetensors, HugeHeaderTakesLittleMemory) {
  const TempDir dir;
  const auto path = dir.path() / "huge";
  {
    std::ofstream out(path, std::ios::binary);
    const std::string begin = R"({"__metadata__":{"k":")";
    const std::string block(1 << 20, 'v');
    const std::uint64_t length = begin.size() + 48 * block.size() + 3;
    out << safetensors_bytes(begin, "", length);
    for (int i = 0; i < 48; ++i) out << block;
    out << "\"}}";
  }
  const long before = peak_rss_kib();
  const auto file = SafetensorsFile::open(path);
  EXPECT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_LT(peak_rss_kib() - before, 8 * 1024) << "KiB, for a header of 48 MiB";
}

TEST(Safetensors, RefusesFoldersAndPipes) {
  const TempDir dir;
  EXPECT_FALSE(SafetensorsFile::open(dir.path()).ok());
  ASSERT_EQ(mkfifo((dir.path() / "fifo").c_str(), 0600), 0);
  EXPECT_EQ(SafetensorsFile::open(dir.path() / "fifo").status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spindle::model
