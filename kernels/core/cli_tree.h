#pragma once
// A command line as data: the manual pages and the shell completions are made from it, so that they
// say what the program accepts.
//
// Thread-safety: as of the CLI::App.

#include <CLI/CLI.hpp>
#include <string>

namespace spindle {

// One JSON object: name, description, footer, version (the whole text, or ""), options and
// commands, the latter objects of the same kind. An option has names (["-h", "--help"]; empty for a
// positional one), positional (its name, or ""), help, group, type (as --help shows it; "" for a
// flag), many, required, default, environment, needs and excludes (names). Options and commands
// without a group are hidden from --help, and here.
std::string cli_tree_json(const CLI::App& app);

// Adds the hidden flag --cli-tree, which prints cli_tree_json(app) and leaves with 0: as
// CLI::CallForVersion from parse(), whose what() is the text. `app` must outlive its parse.
void add_cli_tree_flag(CLI::App& app);

}  // namespace spindle
