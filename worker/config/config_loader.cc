#include "worker/config/config_loader.h"

#include <string>
#include <system_error>

#include "worker/config/text_file.h"

namespace spindle::config {

namespace fs = std::filesystem;

std::string absolute_path(const std::string& path, const fs::path& folder) {
  fs::path result = fs::path(path);
  if (result.is_relative()) {
    std::error_code error;
    fs::path base = fs::absolute(folder, error);
    result = (error ? folder : base) / result;
  }
  result = result.lexically_normal();
  if (!result.has_filename() && result.has_parent_path()) result = result.parent_path();
  return result.string();
}

Result<Config> parse_config_text(std::string_view text, std::string_view name) {
  Config config;
  if (Status status = parse_text(text, name, kMaxConfigFileBytes, config); !status.ok()) {
    return status;
  }
  return config;
}

Result<Config> load_config_file(const fs::path& path) {
  Result<std::string> text = read_text_file(path, kMaxConfigFileBytes);
  if (!text.ok()) return text.status();
  Result<Config> config = parse_config_text(*text, path.string());
  if (!config.ok()) return config.status();
  make_paths_absolute(*config, path.parent_path());
  return config;
}

void make_paths_absolute(Config& config, const fs::path& folder) {
  if (!config.model().path().empty()) {
    config.mutable_model()->set_path(absolute_path(config.model().path(), folder));
  }
  if (!config.kv().profile_table().empty()) {
    config.mutable_kv()->set_profile_table(absolute_path(config.kv().profile_table(), folder));
  }
}

}  // namespace spindle::config
