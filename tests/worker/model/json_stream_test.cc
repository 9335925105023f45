#include "worker/model/json_stream.h"

#include <gmock/gmock.h>

#include <string>

namespace spindle::model {
namespace {

using ::testing::HasSubstr;

// Writes the events down, e.g. {k=a s=b(1) }.
class Recorder final : public JsonSink {
 public:
  std::string text;

  Status on_object_begin() override { return add("{"); }
  Status on_object_end() override { return add("}"); }
  Status on_array_begin() override { return add("["); }
  Status on_array_end() override { return add("]"); }
  Status on_key(std::string_view key) override {
    if (key == "stop") return invalid_argument("stopped");
    return add(std::string(key) + "=");
  }
  Status on_string(std::string_view value, std::size_t total_bytes) override {
    return add("'" + std::string(value) + "'" + std::to_string(total_bytes) + " ");
  }
  Status on_unsigned(std::uint64_t value) override { return add(std::to_string(value) + " "); }
  Status on_other(std::string_view kind) override { return add("<" + std::string(kind) + ">"); }

 private:
  Status add(const std::string& event) {
    text += event;
    return ok_status();
  }
};

// The events, or the error, of `json` fed in pieces of `step` bytes.
std::string events(std::string_view json, std::size_t step, JsonLimits limits = {}) {
  Recorder recorder;
  JsonStream stream(recorder, limits);
  Status status;
  for (std::size_t at = 0; at < json.size() && status.ok(); at += step) {
    status = stream.feed(json.substr(at, step));
  }
  if (status.ok()) status = stream.finish();
  return status.ok() ? recorder.text : status.to_string();
}

TEST(JsonStream, ChunksDoNotMatter) {
  const std::string json =
      R"( {"a\u00e9\n":[1, 18446744073709551615, -1, 2.5, 18446744073709551616],)"
      "\n\"b\":{\"\xc3\xa9\":\"x\\ud83d\\ude00y\"}, \"c\":[true,null,false] }  ";
  const std::string expected =
      "{a\xc3\xa9\n=[1 18446744073709551615 <a negative number>"
      "<a number that is not a 64-bit integer><a number that is not a 64-bit integer>]"
      "b={\xc3\xa9='x\xf0\x9f\x98\x80y'6 }c=[<a boolean><null><a boolean>]}";
  for (std::size_t step = 1; step <= json.size(); ++step) {
    EXPECT_EQ(events(json, step), expected) << "step " << step;
  }
}

TEST(JsonStream, CutsLongStringsAndRefusesLongKeys) {
  const JsonLimits limits{4, 5, 3};
  EXPECT_EQ(events(R"({"abcde":"xyzuv"})", 1, limits), "{abcde='xyz'5 }");
  EXPECT_THAT(events(R"({"abcdef":1})", 100, limits), HasSubstr("longer than 5 bytes"));
  EXPECT_THAT(events(R"({"abcdef":1})", 1, limits), HasSubstr("longer than 5 bytes"));
}

TEST(JsonStream, LimitsDepth) {
  EXPECT_EQ(events("[[[[1]]]]", 1), "[[[[1 ]]]]");
  EXPECT_THAT(events("[[[[[1]]]]]", 1), HasSubstr("deeper than 4"));
  EXPECT_THAT(events(std::string(1 << 20, '['), 4096), HasSubstr("deeper than 4"));
}

TEST(JsonStream, RefusesWhatIsNotOneDocument) {
  for (const std::string_view json : {"",
                                      " ",
                                      "{",
                                      "{\"a\":}",
                                      "{\"a\":1,}",
                                      "{} {}",
                                      "{}x",
                                      "[1,2",
                                      "{\"a\":1 \"b\":2}",
                                      "NaN",
                                      "01",
                                      "// comment\n{}",
                                      "{'a':1}",
                                      "\"\xff\"",
                                      "\"\xc3\"",
                                      "\"\xc0\xaf\"",
                                      "\"\xed\xa0\x80\"",
                                      "\"\xf5\x80\x80\x80\"",
                                      "\"\\ud800\"",
                                      "\"\\ud800x\"",
                                      "\"a\nb\""}) {
    for (const std::size_t step : {std::size_t{1}, std::size_t{1000}}) {
      EXPECT_THAT(events(json, step), HasSubstr("not valid JSON")) << json;
    }
  }
}

TEST(JsonStream, KeepsTheSinksErrorAndStaysFailed) {
  Recorder recorder;
  JsonStream stream(recorder, {});
  EXPECT_EQ(stream.feed(R"({"stop":1, "b":2})").message(), "stopped");
  EXPECT_EQ(stream.feed("{}").message(), "stopped");
  EXPECT_EQ(stream.finish().message(), "stopped");
  EXPECT_EQ(recorder.text, "{");
}

}  // namespace
}  // namespace spindle::model
