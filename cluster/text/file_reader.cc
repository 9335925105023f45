#include "cluster/text/file_reader.h"

#include <fstream>
#include <system_error>

namespace spindle::text {

Result<std::string> read_file(const std::filesystem::path& path, std::size_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return not_found(path.string() + " does not exist");
  // Devices and pipes could be endless or block.
  if (!std::filesystem::is_regular_file(path, error)) {
    return invalid_argument(path.string() + " is not a regular file");
  }
  const std::uintmax_t n_bytes = std::filesystem::file_size(path, error);
  if (error) return invalid_argument(path.string() + ": " + error.message());
  if (n_bytes > max_bytes) {
    return too_large(path.string() + " has " + std::to_string(n_bytes) + " bytes, the limit is " +
                     std::to_string(max_bytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::string contents(static_cast<std::size_t>(n_bytes), '\0');
  file.read(contents.data(), static_cast<std::streamsize>(n_bytes));
  if (!file || static_cast<std::uintmax_t>(file.gcount()) != n_bytes) {
    return invalid_argument(path.string() + " cannot be read");
  }
  return contents;
}

}  // namespace spindle::text
