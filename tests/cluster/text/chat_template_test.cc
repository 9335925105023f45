#include "cluster/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "tests/cluster/text/golden_data.h"

namespace spindle::text {
namespace {

using testing::HasSubstr;

// A model folder of its own for each test.
class ChatTemplateFolder : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::path(testing::TempDir()) / (std::string("chat_") + info->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const std::string& name, const std::string& contents) const {
    std::ofstream(folder_ / name, std::ios::binary) << contents;
  }

  std::filesystem::path folder_;
};

TEST(ChatTemplateGolden, BundledModel) {
  const auto bundled = load_chat_template(bundled_model());
  ASSERT_TRUE(bundled.ok()) << bundled.status().to_string();
  EXPECT_EQ(bundled->special_tokens.at("eos_token"), "<|im_end|>");
  EXPECT_FALSE(bundled->special_tokens.contains("bos_token"));
  const auto golden = golden_data();
  ASSERT_EQ(golden.at("chat").as_array().size(), 2u);
  for (const auto& entry : golden.at("chat").as_array()) {
    const auto text =
        bundled->render({{"messages", entry.at("messages")}, {"add_generation_prompt", true}});
    ASSERT_TRUE(text.ok()) << text.status().to_string();
    EXPECT_EQ(*text, std::string(entry.at("text").as_string()));
  }
}

TEST_F(ChatTemplateFolder, SpecialTokensAreStringsOrObjects) {
  write("tokenizer_config.json", R"({
    "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
    "add_bos_token": true, "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token }}!"})");
  const auto loaded = load_chat_template(folder_);
  ASSERT_TRUE(loaded.ok()) << loaded.status().to_string();
  EXPECT_EQ(*loaded->render({}), "<s></s>!");
  EXPECT_EQ(*loaded->render({{"bos_token", "X"}}), "X</s>!");
}

TEST_F(ChatTemplateFolder, JinjaFileWins) {
  write("tokenizer_config.json", R"({"eos_token": "E", "chat_template": "config"})");
  write("chat_template.jinja", "file {{ eos_token }}\n");
  EXPECT_EQ(*load_chat_template(folder_)->render({}), "file E");
}

TEST_F(ChatTemplateFolder, JinjaFileNeedsNoConfig) {
  write("chat_template.jinja",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}");
  EXPECT_EQ(*load_chat_template(folder_)->render({}), "TrueTrueFalse");
}

TEST_F(ChatTemplateFolder, ListOfTemplates) {
  write("tokenizer_config.json", R"({"chat_template": [
    {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]})");
  EXPECT_EQ(*load_chat_template(folder_)->render({}), "plain");
  write("tokenizer_config.json",
        R"({"chat_template": [{"name": "tool_use", "template": "tools"}]})");
  EXPECT_EQ(load_chat_template(folder_).status().code(), StatusCode::kNotFound);
}

TEST_F(ChatTemplateFolder, Failures) {
  EXPECT_EQ(load_chat_template(folder_).status().code(), StatusCode::kNotFound);
  for (const std::string config : {"[]", "{\"chat_template\": 3}", "{\"chat_template\": [1]}",
                                   "{\"chat_template\": [{\"name\": 1}]}", "{", ""}) {
    write("tokenizer_config.json", config);
    EXPECT_EQ(load_chat_template(folder_).status().code(), StatusCode::kInvalidArgument) << config;
  }
  write("tokenizer_config.json", R"({"chat_template": "a\n{{ }}"})");
  const auto malformed = load_chat_template(folder_);
  EXPECT_THAT(malformed.status().message(), HasSubstr("tokenizer_config.json"));
  EXPECT_THAT(malformed.status().message(), HasSubstr("line 2, column 4"));
  write("chat_template.jinja", "bad \xFF");
  EXPECT_THAT(load_chat_template(folder_).status().message(), HasSubstr("UTF-8 at byte 4"));
  std::filesystem::remove(folder_ / "chat_template.jinja");
  std::filesystem::create_directory(folder_ / "chat_template.jinja");
  EXPECT_EQ(load_chat_template(folder_).status().code(), StatusCode::kInvalidArgument);
}

TEST(ChatTemplate, IsSharedBetweenThreads) {
  const auto parsed = ChatTemplate::parse(
      "{% for m in messages %}{{ m.role | upper }}:{{ m.content | tojson }}{% endfor %}");
  ASSERT_TRUE(parsed.ok());
  const boost::json::object context = {
      {"messages", boost::json::array{{{"role", "user"}, {"content", "hi"}}}}};
  std::vector<std::thread> threads;
  std::vector<int> agreed(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const ChatTemplate copy = *parsed;
      for (int i = 0; i < 100; ++i) agreed[t] += *copy.render(context) == "USER:\"hi\"";
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_THAT(agreed, testing::ElementsAre(100, 100, 100, 100));
}

}  // namespace
}  // namespace spindle::text
