#include "worker/config/profile_table.h"

#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/check.h"
#include "proto/profile.pb.h"
#include "worker/config/text_file.h"

namespace spindle::config {
namespace {

constexpr int kBitOptions = 4;

// Keeps the first error and names the head.
class HeadReader {
 public:
  HeadReader(const profile::Head& head, std::string where)
      : head_(head), where_(std::move(where)) {}

  void bits(const char* name, const google::protobuf::RepeatedField<double>& values,
            std::span<double, kBitOptions> out) {
    if (values.size() != kBitOptions) {
      fail(std::string(name) + " must have 4 values, got " + std::to_string(values.size()));
      return;
    }
    for (int i = 0; i < kBitOptions; ++i) {
      error_value(name, true, values.Get(i), out[static_cast<std::size_t>(i)]);
    }
  }
  void error_value(const char* name, bool is_set, double value, double& out) {
    if (!is_set) {
      fail(std::string(name) + " is not set");
    } else if (!std::isfinite(value) || value < 0) {
      fail(std::string(name) + " must be finite and not negative, got " + std::to_string(value));
    }
    out = value;
  }
  void entries(const char* name, bool is_set, double value, double& out) {
    if (!is_set) {
      fail(std::string(name) + " is not set");
    } else if (!(value > 0 && value <= 1)) {
      fail(std::string(name) + " must be above 0 and at most 1, got " + std::to_string(value));
    }
    out = value;
  }

  kvstore::HeadErrors read() {
    kvstore::HeadErrors out;
    bits("k_bits", head_.k_bits(), out.k_bits);
    bits("v_bits", head_.v_bits(), out.v_bits);
    error_value("int4", head_.has_int4(), head_.int4(), out.int4);
    error_value("codebook", head_.has_codebook(), head_.codebook(), out.codebook);
    entries("codebook_k_entries", head_.has_codebook_k_entries(), head_.codebook_k_entries(),
            out.codebook_k_entries);
    entries("codebook_v_entries", head_.has_codebook_v_entries(), head_.codebook_v_entries(),
            out.codebook_v_entries);
    error_value("window64", head_.has_window64(), head_.window64(), out.window64);
    error_value("window256", head_.has_window256(), head_.window256(), out.window256);
    return out;
  }
  const Status& status() const { return status_; }

 private:
  void fail(const std::string& what) {
    if (status_.ok()) status_ = invalid_argument(where_ + ": " + what);
  }

  const profile::Head& head_;
  const std::string where_;
  Status status_;
};

Result<kvstore::ProfileTable> to_table(const profile::Profile& message, int n_layers,
                                       int n_kv_heads) {
  if (!message.has_n_layers() || !message.has_n_kv_heads()) {
    return invalid_argument("n_layers and n_kv_heads must be set");
  }
  if (message.n_layers() != n_layers || message.n_kv_heads() != n_kv_heads) {
    return invalid_argument("the table is for " + std::to_string(message.n_layers()) +
                            " layers with " + std::to_string(message.n_kv_heads()) +
                            " KV heads, the model has " + std::to_string(n_layers) + " with " +
                            std::to_string(n_kv_heads));
  }
  const auto n_tables = static_cast<std::size_t>(n_layers) * static_cast<std::size_t>(n_kv_heads);
  kvstore::ProfileTable table;
  table.model = message.model();
  table.heads.resize(n_tables);
  std::vector<bool> seen(n_tables, false);
  for (const profile::Head& head : message.head()) {
    const std::string where = "head { layer: " + std::to_string(head.layer()) +
                              " kv_head: " + std::to_string(head.kv_head()) + " }";
    if (!head.has_layer() || !head.has_kv_head()) {
      return invalid_argument("a head without layer or kv_head");
    }
    if (head.layer() < 0 || head.layer() >= n_layers || head.kv_head() < 0 ||
        head.kv_head() >= n_kv_heads) {
      return invalid_argument(where + " is not in the model");
    }
    const auto index =
        static_cast<std::size_t>(head.layer()) * static_cast<std::size_t>(n_kv_heads) +
        static_cast<std::size_t>(head.kv_head());
    if (seen[index]) return invalid_argument(where + " is there twice");
    seen[index] = true;
    HeadReader reader(head, where);
    table.heads[index] = reader.read();
    if (!reader.status().ok()) return reader.status();
  }
  for (std::size_t i = 0; i < n_tables; ++i) {
    if (!seen[i]) {
      const auto per_layer = static_cast<std::size_t>(n_kv_heads);
      return invalid_argument("head { layer: " + std::to_string(i / per_layer) +
                              " kv_head: " + std::to_string(i % per_layer) + " } is missing");
    }
  }
  return table;
}

}  // namespace

Result<kvstore::ProfileTable> parse_profile_table(std::string_view text, std::string_view name,
                                                  int n_layers, int n_kv_heads) {
  CHECK(n_layers > 0 && n_kv_heads > 0, "a model has layers and heads");
  profile::Profile message;
  Status status = parse_text(text, name, kMaxProfileTableBytes, message);
  if (!status.ok()) return status;
  auto table = to_table(message, n_layers, n_kv_heads);
  if (!table.ok()) return table.status().with_context(std::string(name));
  return table;
}

Result<kvstore::ProfileTable> load_profile_table(const std::filesystem::path& path, int n_layers,
                                                 int n_kv_heads) {
  Result<std::string> text = read_text_file(path, kMaxProfileTableBytes);
  if (!text.ok()) return text.status();
  return parse_profile_table(*text, path.string(), n_layers, n_kv_heads);
}

}  // namespace spindle::config
