#include "kernels/core/cli_tree.h"

#include <boost/json.hpp>
#include <set>
#include <string>

namespace spindle {
namespace {

namespace json = boost::json;

json::array names_of(const CLI::Option& option) {
  json::array names;
  for (const std::string& name : option.get_snames()) names.emplace_back("-" + name);
  for (const std::string& name : option.get_lnames()) names.emplace_back("--" + name);
  return names;
}

json::array names_of(const std::set<CLI::Option*>& options) {
  std::set<std::string> names;  // the set of pointers has another order every time
  for (const CLI::Option* option : options) names.insert(option->get_name());
  return json::array(names.begin(), names.end());
}

json::object option_object(const CLI::Option& option) {
  const bool takes_value = option.get_type_size() != 0;
  return {
      {"names", names_of(option)},
      {"positional", option.get_positional() ? option.get_name(true) : std::string()},
      {"help", option.get_description()},
      {"group", option.get_group()},
      {"type", takes_value ? option.get_type_name() : std::string()},
      {"many", takes_value && option.get_expected_max() > 1},
      {"required", option.get_required()},
      {"default", takes_value ? option.get_default_str() : std::string()},
      {"environment", option.get_envname()},
      {"needs", names_of(option.get_needs())},
      {"excludes", names_of(option.get_excludes())},
  };
}

json::object app_object(const CLI::App& app) {
  json::array options;
  for (const CLI::Option* option : app.get_options()) {
    if (!option->get_group().empty()) options.push_back(option_object(*option));
  }
  json::array commands;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (!command->get_group().empty()) commands.push_back(app_object(*command));
  }
  return {
      {"name", app.get_name()},     {"description", app.get_description()},
      {"footer", app.get_footer()}, {"version", app.version()},
      {"options", options},         {"commands", commands},
  };
}

}  // namespace

std::string cli_tree_json(const CLI::App& app) { return json::serialize(app_object(app)); }

void add_cli_tree_flag(CLI::App& app) {
  app.add_flag_callback("--cli-tree", [&app] { throw CLI::CallForVersion(cli_tree_json(app), 0); })
      ->group("");
}

}  // namespace spindle
