// Records, their choice, and the way from a conversation to token positions.

#include "ops/cli/eval_data.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <set>

#include "ops/cli/eval_config.h"
#include "ops/cli/eval_plan.h"
#include "ops/cli/eval_probe.h"
#include "tests/source_dir.h"

namespace spindle::cli {
namespace {

const std::string kSource = source_dir();

TEST(EvalData, Record) {
  const auto record = parse_record(
      R"({"task":"t","tokens":12,"messages":[{"role":"user","content":"A\n\nB.\n\nWhat?"},)"
      R"({"role":"assistant","content":"X"}]})",
      3);
  ASSERT_TRUE(record.ok()) << record.status().to_string();
  EXPECT_EQ(record->index, 3);
  EXPECT_EQ(record->task, "t");
  EXPECT_EQ(record->n_tokens, 12);
  EXPECT_EQ(record->messages[0].content.substr(0, record->document_bytes), "A\n\nB.");
  EXPECT_FALSE(record->is_prose());
  const auto prose = parse_record(R"({"task":"prose","tokens":5,"text":"Once."})", 0);
  ASSERT_TRUE(prose.ok());
  EXPECT_TRUE(prose->is_prose());
}

TEST(EvalData, RefusesWrongRecords) {
  for (const char* line :
       {"", "[]", "{", R"({"task":1,"tokens":1,"text":""})", R"({"task":"t","text":"x"})",
        R"({"task":"t","tokens":0,"text":"x"})", R"({"task":"t","tokens":1})",
        R"({"task":"t","tokens":1,"messages":[]})",
        R"({"task":"t","tokens":1,"messages":[{"role":"user","content":"a\n\nb"}]})",
        R"({"task":"t","tokens":1,"messages":[{"role":"user","content":"no question"},)"
        R"({"role":"assistant","content":"x"}]})",
        R"({"task":"t","tokens":1,"messages":[{"role":"assistant","content":"a\n\nb"},)"
        R"({"role":"user","content":"x"}]})",
        R"({"task":"t","tokens":1,"messages":[1,2]})"}) {
    EXPECT_EQ(parse_record(line, 0).status().code(), StatusCode::kInvalidArgument) << line;
  }
  EXPECT_EQ(
      parse_records("{\"task\":\"t\",\"tokens\":1,\"text\":\"x\"}\n\nwrong\n").status().message(),
      "line 3: not a JSON object");
  EXPECT_FALSE(parse_records("").ok());
}

TEST(EvalData, Buckets) {
  EXPECT_EQ(length_bucket(1400), "2k");
  EXPECT_EQ(length_bucket(2069), "2k");
  EXPECT_EQ(length_bucket(3600), "4k");
  EXPECT_EQ(length_bucket(4062), "4k");
  EXPECT_EQ(length_bucket(6958), "7.8k");
  EXPECT_EQ(length_bucket(7868), "7.8k");
  EXPECT_EQ(length_bucket(0), "2k");
}

// 2 tasks x 2 lengths x 3 records.
std::vector<EvalRecord> small_set() {
  std::vector<EvalRecord> records;
  for (int i = 0; i < 12; ++i) {
    EvalRecord record;
    record.index = i;
    record.task = i % 2 == 0 ? "a" : "b";
    record.n_tokens = i < 6 ? 2000 : 4000;
    records.push_back(record);
  }
  return records;
}

TEST(EvalData, SpreadsEvenly) {
  EXPECT_EQ(spread_records(small_set(), 0).size(), 12U);
  EXPECT_EQ(spread_records(small_set(), 100).size(), 12U);
  for (std::size_t limit = 1; limit <= 12; ++limit) {
    const auto chosen = spread_records(small_set(), limit);
    ASSERT_EQ(chosen.size(), limit);
    std::map<std::pair<std::string, std::string>, std::size_t> groups;
    std::set<int> indexes;
    for (const EvalRecord& record : chosen) {
      ++groups[{record.task, length_bucket(record.n_tokens)}];
      indexes.insert(record.index);
    }
    EXPECT_EQ(indexes.size(), limit) << "a record twice";
    for (const auto& [group, n] : groups) EXPECT_LE(n, limit / 4 + 1) << limit;
    if (limit >= 4) {
      EXPECT_EQ(groups.size(), 4U) << limit;
    }
  }
}

TEST(EvalData, SmallGroupsGiveWhatTheyHave) {
  auto records = small_set();
  for (std::size_t i = 1; i < records.size(); ++i) records[i].task = "b";
  EXPECT_EQ(spread_records(records, 11).size(), 11U);
}

TEST(EvalData, PlainAndCutFiles) {
  const std::string path = testing::TempDir() + "/spindle_eval_data.txt";
  std::ofstream(path) << "plain text";
  EXPECT_EQ(read_gzip(path).value(), "plain text");
  std::string bytes;
  {
    std::ifstream in(kSource + "/eval/calibration.jsonl.gz", std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  ASSERT_GT(bytes.size(), 1000U);
  std::ofstream(path, std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  EXPECT_EQ(read_gzip(path).status().code(), StatusCode::kInvalidArgument);
  ::unlink(path.c_str());
  EXPECT_EQ(read_gzip(path).status().code(), StatusCode::kNotFound);
  EXPECT_EQ(checksum("123456789"), 0xCBF43926U);  // CRC-32's check value
}

std::vector<EvalRecord> load(const std::string& name) {
  const auto text = read_gzip(kSource + "/eval/" + name);
  EXPECT_TRUE(text.ok());
  auto records = parse_records(text.value());
  EXPECT_TRUE(records.ok()) << records.status().to_string();
  return std::move(records).value();
}

TEST(EvalData, PublicSet) {
  const auto records = load("public.jsonl.gz");
  ASSERT_EQ(records.size(), 300U);
  std::map<std::pair<std::string, std::string>, int> groups;
  std::size_t n_answers = 0;
  for (const EvalRecord& record : records) {
    ++groups[{record.task, length_bucket(record.n_tokens)}];
    n_answers += record.messages.size() / 2;
    const std::string question = record.messages[0].content.substr(record.document_bytes + 2);
    EXPECT_TRUE(question.starts_with("What is ") || question.starts_with("In which city ") ||
                question.starts_with("List all ") || question.starts_with("Which variables "))
        << question;
  }
  EXPECT_EQ(n_answers, 1301U);
  EXPECT_EQ(groups.size(), 15U);
  for (const auto& [group, n] : groups) EXPECT_EQ(n, 20) << group.first << " " << group.second;
  EXPECT_EQ(load("calibration.jsonl.gz").size(), 88U);
}

class EvalProbe : public testing::Test {
 protected:
  void SetUp() override {
    auto model = load_eval_model(kSource + "/models/spindle-mini/");
    ASSERT_TRUE(model.ok()) << model.status().to_string();
    model_ = std::move(model).value();
  }
  std::string decode(const Probe& probe, std::int32_t first, std::int32_t end) const {
    return model_.tokenizer->decode(
        std::span(probe.tokens)
            .subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(end - first)),
        false);
  }
  EvalModel model_;
};

TEST_F(EvalProbe, ModelShape) {
  EXPECT_EQ(model_.name, "spindle-mini");
  EXPECT_EQ(model_.n_layers, 12);
  EXPECT_EQ(model_.n_kv_heads, 2);
}

TEST_F(EvalProbe, Positions) {
  EvalRecord record;
  record.messages = {{"user", "The door is red\n\nWhat is red?"},
                     {"assistant", "The door"},
                     {"user", "And?"},
                     {"assistant", "No more"}};
  record.document_bytes = 15;
  const auto conversation = render_conversation(*model_.chat_template, record);
  ASSERT_TRUE(conversation.ok()) << conversation.status().to_string();
  const auto text = tokenize(*model_.tokenizer, conversation->text);
  ASSERT_TRUE(text.ok());
  const Probe qa = qa_probe(*conversation, *text);
  EXPECT_FALSE(qa.moved);
  EXPECT_EQ(decode(qa, 0, qa.cut), "<|im_start|>user\nThe door is red");
  ASSERT_EQ(qa.answers.size(), 2U);
  EXPECT_EQ(decode(qa, qa.answers[0].first, qa.answers[0].end), "The door<|im_end|>");
  EXPECT_EQ(decode(qa, qa.answers[1].first, qa.answers[1].end), "No more<|im_end|>");
  EXPECT_EQ(qa.answers[1].end, static_cast<std::int32_t>(qa.tokens.size()));
  const Probe qw = qw_probe(*conversation, *text);
  EXPECT_EQ(decode(qw, 0, qw.cut),
            "<|im_start|>user\nThe door is red\n\nWhat is red?<|im_end|>\n<|im_start|>assistant\n");
  ASSERT_EQ(qw.answers.size(), 1U);
  EXPECT_EQ(qw.answers[0].first, qw.cut + 1);
  EXPECT_EQ(decode(qw, qw.cut, qw.answers[0].end), "The door<|im_end|>");
  EXPECT_EQ(qw.answers[0].end, static_cast<std::int32_t>(qw.tokens.size()));
}

TEST_F(EvalProbe, ACutInsideATokenMovesToItsBegin) {
  EvalRecord record;
  record.messages = {{"user", "The door is red.\n\nWhat?"}, {"assistant", "The door"}};
  record.document_bytes = 7;  // "The doo"
  const auto conversation = render_conversation(*model_.chat_template, record);
  ASSERT_TRUE(conversation.ok());
  const auto text = tokenize(*model_.tokenizer, conversation->text);
  ASSERT_TRUE(text.ok());
  const Probe probe = qa_probe(*conversation, *text);
  EXPECT_TRUE(probe.moved);
  EXPECT_EQ(decode(probe, 0, probe.cut), "<|im_start|>user\nThe");
  // This tokenizer joins a full stop and the empty line behind it.
  record.document_bytes = 16;
  const Probe stop = qa_probe(*render_conversation(*model_.chat_template, record), *text);
  EXPECT_TRUE(stop.moved);
  EXPECT_EQ(decode(stop, 0, stop.cut), "<|im_start|>user\nThe door is red");
}

// Every public record: about as many tokens as the file says, and no answer's token is shared with
// its surroundings.
TEST_F(EvalProbe, WholeSets) {
  int n_moved = 0;
  std::int32_t longest = 0;
  for (const EvalRecord& record : load("public.jsonl.gz")) {
    const auto conversation = render_conversation(*model_.chat_template, record);
    ASSERT_TRUE(conversation.ok());
    const auto text = tokenize(*model_.tokenizer, conversation->text);
    ASSERT_TRUE(text.ok());
    EXPECT_NEAR(static_cast<double>(text->tokens.size()), static_cast<double>(record.n_tokens), 8)
        << record.index;
    const Probe probe = qa_probe(*conversation, *text);
    n_moved += probe.moved ? 1 : 0;
    longest = std::max(longest, probe.answers.back().end - probe.answers.front().first);
    for (std::size_t i = 0; i < probe.answers.size(); ++i) {
      EXPECT_EQ(decode(probe, probe.answers[i].first, probe.answers[i].end),
                record.messages[2 * i + 1].content + "<|im_end|>")
          << record.index;
    }
    EXPECT_LT(probe.tokens.size(), 8192U);
  }
  RecordProperty("moved", n_moved);
  std::cout << n_moved << " cuts moved, longest range of answers " << longest << " tokens\n";
  EXPECT_LE(n_moved, 20);   // documents that end in a full stop or white space
  EXPECT_LE(longest, 256);  // a server's default limit
}

TEST_F(EvalProbe, Plan) {
  const auto cells = make_cells({"spindle"}, {25});
  ASSERT_TRUE(cells.ok());
  TaskPlan plan;
  const auto records = spread_records(load("calibration.jsonl.gz"), 11);
  ASSERT_TRUE(add_records(records, {Regime::kQa, Regime::kQw}, *cells, model_, 8192, plan).ok());
  std::set<std::string> keys;
  int n_prose = 0;
  for (const EvalTask& task : plan.tasks) {
    keys.insert(task.item.key);
    n_prose += task.item.regime == Regime::kProse ? 1 : 0;
    EXPECT_EQ(task.cells.size(), 2U);
  }
  EXPECT_EQ(n_prose, 1);
  EXPECT_EQ(plan.tasks.size(), 21U);  // 10 conversations twice
  EXPECT_EQ(keys.size(), 21U);
  TaskPlan short_context;
  ASSERT_TRUE(add_records(records, {Regime::kQa}, *cells, model_, 2048, short_context).ok());
  EXPECT_EQ(short_context.n_too_long, 5);
}

TEST_F(EvalProbe, Prose) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text += "a word ";
  TaskPlan plan;
  const auto n = tokenize(*model_.tokenizer, text).value().tokens.size();
  ASSERT_TRUE(add_prose(text, {100, 300}, 3, {full_cell()}, model_, 8192, plan).ok());
  const auto expected = std::min<std::size_t>(n / 357, 3) + std::min<std::size_t>(n / 557, 3);
  ASSERT_EQ(plan.tasks.size(), expected);
  const Probe& probe = plan.tasks[1].probe;
  EXPECT_EQ(plan.tasks[1].item.key, "prose-100:1");
  EXPECT_EQ(probe.cut, 100);
  EXPECT_EQ(probe.answers, (std::vector<TokenSpan>{{.first = 101, .end = 357}}));
  EXPECT_EQ(probe.tokens.size(), 357U);
  EXPECT_FALSE(add_prose(text, {100000}, 3, {full_cell()}, model_, 8192, plan).ok());
  EXPECT_FALSE(add_prose(text, {300}, 3, {full_cell()}, model_, 400, plan).ok());
}

TEST(EvalSplit, PartsKeepAnswersWhole) {
  const std::vector<TokenSpan> answers{{10, 15}, {30, 36}, {50, 54}};
  EXPECT_EQ(split_answers(answers, 44).size(), 1U);
  const auto parts = split_answers(answers, 43);
  ASSERT_EQ(parts.size(), 2U);
  EXPECT_EQ(parts[0], (std::vector<TokenSpan>{{10, 15}, {30, 36}}));
  EXPECT_EQ(parts[1], (std::vector<TokenSpan>{{50, 54}}));
  EXPECT_EQ(split_answers(answers, 1).size(), 3U);
}

TEST(EvalConfig, ModelPathIsFromTheFilesFolder) {
  const auto config = read_config(kSource + "/configs/mini-cpu.pbtxt");
  ASSERT_TRUE(config.ok()) << config.status().to_string();
  EXPECT_EQ(config->model().path(), kSource + "/models/spindle-mini");
  EXPECT_EQ(config->api().tcp().port(), 8001);
  const std::string path = testing::TempDir() + "/spindle_eval_config.pbtxt";
  std::ofstream(path) << "model {\n  wrong: 1\n}\n";
  EXPECT_NE(read_config(path).status().message().find(":2:"), std::string::npos);
  std::ofstream(path) << "api {}\n";
  EXPECT_FALSE(read_config(path).ok());
  ::unlink(path.c_str());
}

}  // namespace
}  // namespace spindle::cli
