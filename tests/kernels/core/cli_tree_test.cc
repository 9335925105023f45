#include "kernels/core/cli_tree.h"

#include <gtest/gtest.h>

#include <boost/json.hpp>
#include <string>

namespace spindle {
namespace {

namespace json = boost::json;

TEST(CliTreeTest, SaysWhatTheProgramAccepts) {
  CLI::App app("Does \"things\"", "tool");
  app.footer("Exit codes: 0");
  app.set_version_flag("--version", "tool 1");
  auto* run = app.add_subcommand("run", "Runs it");
  std::string file;
  std::string mode = "fast";
  std::string key;
  bool quiet = false;
  run->add_option("file", file, "What to run")->type_name("FILE")->required();
  run->add_option("-m,--mode", mode, "How")
      ->check(CLI::IsMember({"fast", "slow"}))
      ->capture_default_str()
      ->group("Speed");
  auto* key_option = run->add_option("--key", key, "Secret")->envname("TOOL_KEY");
  run->add_flag("--quiet", quiet, "Says nothing")->excludes(key_option);
  run->add_flag("--secret-flag", quiet, "Hidden")->group("");
  app.add_subcommand("internal", "Hidden")->group("");
  add_cli_tree_flag(app);

  const json::value tree = json::parse(cli_tree_json(app));
  EXPECT_EQ(tree.at("name"), "tool");
  EXPECT_EQ(tree.at("description"), "Does \"things\"");
  EXPECT_EQ(tree.at("footer"), "Exit codes: 0");
  EXPECT_EQ(tree.at("version"), "tool 1");
  ASSERT_EQ(tree.at("options").as_array().size(), 2U);  // --help, --version
  ASSERT_EQ(tree.at("commands").as_array().size(), 1U);

  const json::value& command = tree.at("commands").at(0);
  EXPECT_EQ(command.at("name"), "run");
  const json::array& options = command.at("options").as_array();
  ASSERT_EQ(options.size(), 5U);  // --help and the four that are not hidden
  const json::value& position = options[1];
  EXPECT_EQ(position.at("positional"), "file");
  EXPECT_TRUE(position.at("names").as_array().empty());
  EXPECT_EQ(position.at("type"), "FILE");
  EXPECT_TRUE(position.at("required").as_bool());
  const json::value& speed = options[2];
  EXPECT_EQ(speed.at("names"), (json::array{"-m", "--mode"}));
  EXPECT_EQ(speed.at("group"), "Speed");
  EXPECT_EQ(speed.at("type"), "TEXT:{fast,slow}");
  EXPECT_EQ(speed.at("default"), "fast");
  EXPECT_EQ(options[3].at("environment"), "TOOL_KEY");
  EXPECT_EQ(options[4].at("type"), "");
  EXPECT_EQ(options[4].at("excludes"), (json::array{"--key"}));
}

TEST(CliTreeTest, TheFlagGivesTheTreeAndNeedsNoSubcommand) {
  CLI::App app("A tool", "tool");
  app.require_subcommand(1);
  app.add_subcommand("run", "Runs it");
  add_cli_tree_flag(app);
  const char* arguments[] = {"tool", "--cli-tree"};
  try {
    app.parse(2, arguments);
    FAIL() << "parse() returned";
  } catch (const CLI::CallForVersion& text) {
    EXPECT_EQ(text.what(), cli_tree_json(app));
    EXPECT_EQ(text.get_exit_code(), 0);
  }
}

}  // namespace
}  // namespace spindle
