#include "worker/model/safetensors.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "worker/model/printable.h"

namespace spindle::model {
namespace {

constexpr std::uint64_t kPrefixBytes = 8;
constexpr std::uint64_t kChunkBytes = 64 * 1024;

struct ParsedHeader {
  std::uint64_t data_offset = 0;
  std::vector<TensorInfo> tensors;
  std::vector<std::uint32_t> by_name;
};

Result<std::uint64_t> read_header_length(const RegularFile& file) {
  if (file.size_bytes() < kPrefixBytes) {
    return invalid_argument("shorter than the 8 bytes of the header length");
  }
  std::array<std::byte, kPrefixBytes> bytes{};
  const Status status = file.read_at(0, bytes);
  if (!status.ok()) return status;
  std::uint64_t length = 0;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    length |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  }
  if (length > kMaxHeaderBytes) {
    return too_large("header of " + std::to_string(length) + " bytes, at most " +
                     std::to_string(kMaxHeaderBytes) + " are allowed");
  }
  if (length > file.size_bytes() - kPrefixBytes) {
    return invalid_argument("header of " + std::to_string(length) + " bytes in a file of " +
                            std::to_string(file.size_bytes()));
  }
  return length;
}

Result<ParsedHeader> read_header(const RegularFile& file) {
  const Result<std::uint64_t> length = read_header_length(file);
  if (!length.ok()) return length.status();
  SafetensorsHeaderParser parser;
  std::string chunk;
  for (std::uint64_t done = 0; done < *length; done += chunk.size()) {
    chunk.resize(static_cast<std::size_t>(std::min(kChunkBytes, *length - done)));
    Status status = file.read_at(kPrefixBytes + done, std::as_writable_bytes(std::span(chunk)));
    if (!status.ok()) return status;
    if (done == 0 && chunk.front() != '{') {
      return invalid_argument("the header does not begin with \"{\"");
    }
    status = parser.feed(chunk);
    if (!status.ok()) return status.with_context("header");
  }
  ParsedHeader header;
  header.data_offset = kPrefixBytes + *length;
  Result<std::vector<TensorInfo>> tensors = parser.finish(file.size_bytes() - header.data_offset);
  if (!tensors.ok()) return tensors.status().with_context("header");
  header.tensors = *std::move(tensors);
  Result<std::vector<std::uint32_t>> by_name = sort_by_name(header.tensors);
  if (!by_name.ok()) return by_name.status().with_context("header");
  header.by_name = *std::move(by_name);
  return header;
}

}  // namespace

Result<SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  Result<RegularFile> file = RegularFile::open(path);
  if (!file.ok()) return file.status();
  Result<ParsedHeader> header = read_header(*file);
  if (!header.ok()) return header.status().with_context(in_quotes(path.string()));
  return SafetensorsFile(*std::move(file), header->data_offset, std::move(header->tensors),
                         std::move(header->by_name));
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto at = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [&](std::uint32_t index, std::string_view wanted) { return tensors_[index].name < wanted; });
  if (at == by_name_.end() || tensors_[*at].name != name) return nullptr;
  return &tensors_[*at];
}

Status SafetensorsFile::read(const TensorInfo& tensor, std::span<std::byte> out) const {
  if (out.size() != tensor.n_bytes()) {
    return invalid_argument("tensor " + in_quotes(tensor.name) + " has " +
                            std::to_string(tensor.n_bytes()) + " bytes, asked for " +
                            std::to_string(out.size()));
  }
  return read_range(tensor, 0, out);
}

Status SafetensorsFile::read_range(const TensorInfo& tensor, std::uint64_t offset_bytes,
                                   std::span<std::byte> out) const {
  if (offset_bytes > tensor.n_bytes() || out.size() > tensor.n_bytes() - offset_bytes) {
    return invalid_argument("tensor " + in_quotes(tensor.name) + " has " +
                            std::to_string(tensor.n_bytes()) + " bytes, asked for " +
                            std::to_string(out.size()) + " from " + std::to_string(offset_bytes));
  }
  return file_.read_at(data_offset_ + tensor.begin + offset_bytes, out)
      .with_context("tensor " + in_quotes(tensor.name));
}

Status SafetensorsFile::read_rows(const TensorInfo& tensor, std::int64_t first_row,
                                  std::int64_t n_rows, std::span<std::byte> out) const {
  const std::int64_t rows = tensor.shape.empty() ? 0 : tensor.shape.front();
  if (first_row < 0 || n_rows < 0 || first_row > rows || n_rows > rows - first_row) {
    return invalid_argument("tensor " + in_quotes(tensor.name) + " has " + std::to_string(rows) +
                            " rows, asked for " + std::to_string(n_rows) + " from " +
                            std::to_string(first_row));
  }
  const std::uint64_t total_rows = static_cast<std::uint64_t>(std::max<std::int64_t>(rows, 1));
  if (tensor.n_bytes() % total_rows != 0) {
    return unimplemented("tensor " + in_quotes(tensor.name) + ": rows do not end on a byte");
  }
  const std::uint64_t row_bytes = tensor.n_bytes() / total_rows;
  if (out.size() != row_bytes * static_cast<std::uint64_t>(n_rows)) {
    return invalid_argument("tensor " + in_quotes(tensor.name) + ": rows of " +
                            std::to_string(row_bytes) + " bytes, " + std::to_string(n_rows) +
                            " of them asked into " + std::to_string(out.size()) + " bytes");
  }
  return read_range(tensor, row_bytes * static_cast<std::uint64_t>(first_row), out);
}

}  // namespace spindle::model
