#include "worker/model/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "worker/model/printable.h"

namespace spindle::model {
namespace {

std::string errno_text(int error) { return std::generic_category().message(error); }

Status open_failure(const std::string& path, int error) {
  if (error == ENOENT || error == ENOTDIR) return not_found(in_quotes(path) + ": no such file");
  return invalid_argument(in_quotes(path) + ": cannot open: " + errno_text(error));
}

}  // namespace

Result<RegularFile> RegularFile::open(const std::filesystem::path& path) {
  // O_NONBLOCK: without it, opening a FIFO waits for a writer.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (fd < 0) return open_failure(path.string(), errno);
  RegularFile file(fd, 0);
  struct stat info {};
  if (::fstat(fd, &info) != 0) {
    return invalid_argument(in_quotes(path.string()) + ": cannot stat: " + errno_text(errno));
  }
  if (!S_ISREG(info.st_mode)) {
    return invalid_argument(in_quotes(path.string()) + ": not a regular file");
  }
  file.size_bytes_ = static_cast<std::uint64_t>(info.st_size);
  return file;
}

RegularFile::RegularFile(RegularFile&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), size_bytes_(other.size_bytes_) {}

RegularFile& RegularFile::operator=(RegularFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

RegularFile::~RegularFile() {
  if (fd_ >= 0) ::close(fd_);
}

Status RegularFile::read_at(std::uint64_t offset, std::span<std::byte> out) const {
  if (offset > size_bytes_ || out.size() > size_bytes_ - offset) {
    return invalid_argument("read of " + std::to_string(out.size()) + " bytes at " +
                            std::to_string(offset) + " is outside the file of " +
                            std::to_string(size_bytes_) + " bytes");
  }
  while (!out.empty()) {
    // Linux moves at most 2^31 - 4096 bytes per call.
    const std::size_t want = std::min<std::size_t>(out.size(), std::size_t{1} << 30);
    const ssize_t got = ::pread(fd_, out.data(), want, static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      return unavailable("read failed at byte " + std::to_string(offset) + ": " +
                         errno_text(errno));
    }
    if (got == 0) {
      return invalid_argument("file became shorter while being read: ended at byte " +
                              std::to_string(offset));
    }
    out = out.subspan(static_cast<std::size_t>(got));
    offset += static_cast<std::uint64_t>(got);
  }
  return ok_status();
}

Result<std::string> read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes) {
  Result<RegularFile> file = RegularFile::open(path);
  if (!file.ok()) return file.status();
  if (file->size_bytes() > max_bytes) {
    return too_large(in_quotes(path.string()) + ": " + std::to_string(file->size_bytes()) +
                     " bytes, at most " + std::to_string(max_bytes) + " are allowed");
  }
  std::string text(static_cast<std::size_t>(file->size_bytes()), '\0');
  const Status status = file->read_at(0, std::as_writable_bytes(std::span(text)));
  if (!status.ok()) return status.with_context(in_quotes(path.string()));
  return text;
}

}  // namespace spindle::model
