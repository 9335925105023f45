#include "worker/model/checkpoint.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "worker/model/json_stream.h"
#include "worker/model/printable.h"
#include "worker/model/regular_file.h"

namespace spindle::model {
namespace {

constexpr std::string_view kIndexName = "model.safetensors.index.json";
constexpr std::string_view kSingleName = "model.safetensors";
constexpr std::string_view kSuffix = ".safetensors";
constexpr std::size_t kMaxFileNameBytes = 255;
constexpr std::size_t kMaxIndexDepth = 8;

struct IndexEntry {
  std::string name;
  std::uint32_t shard = 0;
};

struct Index {
  std::vector<IndexEntry> entries;  // sorted by name
  std::vector<std::string> shard_names;
};

// A plain name of a file beside the index: nothing in it may lead elsewhere.
Status check_shard_name(std::string_view name, std::size_t total_bytes) {
  const bool plain = std::all_of(name.begin(), name.end(), [](char c) {
    return static_cast<unsigned char>(c) >= 0x20 && c != '/' && c != '\\' && c != 0x7f;
  });
  if (total_bytes > kMaxFileNameBytes || !plain || name.find("..") != std::string_view::npos ||
      !name.ends_with(kSuffix) || name.size() == kSuffix.size()) {
    return invalid_argument("file name " + in_quotes(name) +
                            " is not a plain *.safetensors name beside the index");
  }
  return ok_status();
}

// Follows {"metadata": anything, "weight_map": {tensor: file}}.
class IndexSink final : public JsonSink {
 public:
  Result<Index> take() {
    if (!has_weight_map_) return invalid_argument("\"weight_map\" is missing");
    std::sort(index_.entries.begin(), index_.entries.end(),
              [](const IndexEntry& a, const IndexEntry& b) { return a.name < b.name; });
    const auto twice = std::adjacent_find(
        index_.entries.begin(), index_.entries.end(),
        [](const IndexEntry& a, const IndexEntry& b) { return a.name == b.name; });
    if (twice != index_.entries.end()) {
      return invalid_argument("tensor " + in_quotes(twice->name) + " occurs twice");
    }
    return std::move(index_);
  }

  Status on_object_begin() override { return begin(true); }
  Status on_object_end() override { return end(); }
  Status on_array_begin() override { return begin(false); }
  Status on_array_end() override { return end(); }

  Status on_key(std::string_view key) override {
    if (depth_ == 1) {
      in_weight_map_ = key == "weight_map";
      if (in_weight_map_ && std::exchange(has_weight_map_, true)) {
        return invalid_argument("\"weight_map\" occurs twice");
      }
    } else if (in_weight_map_) {
      if (index_.entries.size() == kMaxCheckpointTensors) {
        return too_large("more than " + std::to_string(kMaxCheckpointTensors) + " tensors");
      }
      name_ = key;
    }
    return ok_status();
  }

  Status on_string(std::string_view text, std::size_t total_bytes) override {
    if (depth_ == 0) return not_an_object();
    if (!in_weight_map_) return ok_status();
    if (depth_ == 1) return not_a_map();
    const Status status = check_shard_name(text, total_bytes);
    if (!status.ok()) return status.with_context("tensor " + in_quotes(name_));
    const auto [at, inserted] = shards_.try_emplace(
        std::string(text), static_cast<std::uint32_t>(index_.shard_names.size()));
    if (inserted) {
      if (index_.shard_names.size() == kMaxShards) {
        return too_large("more than " + std::to_string(kMaxShards) + " files");
      }
      index_.shard_names.emplace_back(text);
    }
    index_.entries.push_back({std::move(name_), at->second});
    return ok_status();
  }

  Status on_unsigned(std::uint64_t) override { return on_other("a number"); }
  Status on_other(std::string_view) override {
    if (depth_ == 0) return not_an_object();
    return in_weight_map_ ? not_a_map() : ok_status();
  }

 private:
  static Status not_an_object() { return invalid_argument("not a JSON object"); }
  static Status not_a_map() {
    return invalid_argument("\"weight_map\" must map tensor names to file names");
  }

  Status begin(bool object) {
    if (depth_ == 0 && !object) return not_an_object();
    if (in_weight_map_ && (depth_ != 1 || !object)) return not_a_map();
    ++depth_;
    return ok_status();
  }
  Status end() {
    --depth_;
    if (depth_ == 1) in_weight_map_ = false;
    return ok_status();
  }

  std::size_t depth_ = 0;
  bool in_weight_map_ = false;
  bool has_weight_map_ = false;
  std::string name_;
  std::map<std::string, std::uint32_t, std::less<>> shards_;
  Index index_;
};

Result<Index> parse_index(std::string_view text) {
  IndexSink sink;
  JsonStream stream(sink, {kMaxIndexDepth, kMaxTensorNameBytes, kMaxFileNameBytes});
  Status status = stream.feed(text);
  if (status.ok()) status = stream.finish();
  if (!status.ok()) return status;
  return sink.take();
}

}  // namespace

struct Checkpoint::State {
  Result<const SafetensorsFile*> open_shard(std::uint32_t shard);
  Status check_shard(std::uint32_t shard, const SafetensorsFile& file);
  const IndexEntry* find_entry(std::string_view name) const;

  std::filesystem::path model_dir;
  Index index;
  std::vector<std::string> names;  // as in index.entries
  std::atomic<std::uint64_t> bytes_read = 0;

  std::mutex mutex;  // guards what follows; an opened shard itself is immutable
  std::vector<std::unique_ptr<const SafetensorsFile>> shards;  // as in index.shard_names; or null
  std::vector<std::string> unlisted_names;
};

Checkpoint::Checkpoint(std::unique_ptr<State> state) : state_(std::move(state)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

const IndexEntry* Checkpoint::State::find_entry(std::string_view name) const {
  const auto at =
      std::lower_bound(index.entries.begin(), index.entries.end(), name,
                       [](const IndexEntry& entry, std::string_view n) { return entry.name < n; });
  return at == index.entries.end() || at->name != name ? nullptr : &*at;
}

// Every tensor that the index places in this shard must be there.
Status Checkpoint::State::check_shard(std::uint32_t shard, const SafetensorsFile& file) {
  for (const IndexEntry& entry : index.entries) {
    if (entry.shard == shard && file.find(entry.name) == nullptr) {
      return invalid_argument(in_quotes(index.shard_names[shard]) + " does not hold tensor " +
                              in_quotes(entry.name) + ", which the index places there");
    }
  }
  return ok_status();
}

Result<const SafetensorsFile*> Checkpoint::State::open_shard(std::uint32_t shard) {
  const std::lock_guard lock(mutex);
  if (shards[shard] != nullptr) return shards[shard].get();
  Result<SafetensorsFile> file = SafetensorsFile::open(model_dir / index.shard_names[shard]);
  if (!file.ok()) return file.status();
  const Status status = check_shard(shard, *file);
  if (!status.ok()) return status;
  for (const TensorInfo& tensor : file->tensors()) {
    if (find_entry(tensor.name) == nullptr) unlisted_names.push_back(tensor.name);
  }
  shards[shard] = std::make_unique<const SafetensorsFile>(*std::move(file));
  return shards[shard].get();
}

Result<Checkpoint> Checkpoint::open(const std::filesystem::path& model_dir) {
  auto state = std::make_unique<State>();
  state->model_dir = model_dir;
  const std::filesystem::path index_path = model_dir / kIndexName;
  const Result<std::string> text = read_text_file(index_path, kMaxIndexBytes);
  if (text.ok()) {
    Result<Index> index = parse_index(*text);
    if (!index.ok()) return index.status().with_context(in_quotes(index_path.string()));
    state->index = *std::move(index);
    state->shards.resize(state->index.shard_names.size());
  } else if (text.status().code() == StatusCode::kNotFound) {
    Result<SafetensorsFile> file = SafetensorsFile::open(model_dir / kSingleName);
    if (file.status().code() == StatusCode::kNotFound) {
      return not_found(in_quotes(model_dir.string()) + " holds neither " + std::string(kIndexName) +
                       " nor " + std::string(kSingleName) + " (other formats are not read)");
    }
    if (!file.ok()) return file.status();
    for (const TensorInfo& tensor : file->tensors()) {
      state->index.entries.push_back({tensor.name, 0});
    }
    std::sort(state->index.entries.begin(), state->index.entries.end(),
              [](const IndexEntry& a, const IndexEntry& b) { return a.name < b.name; });
    state->index.shard_names.emplace_back(kSingleName);
    state->shards.push_back(std::make_unique<const SafetensorsFile>(*std::move(file)));
  } else {
    return text.status();
  }
  for (const IndexEntry& entry : state->index.entries) state->names.push_back(entry.name);
  return Checkpoint(std::move(state));
}

const std::vector<std::string>& Checkpoint::names() const { return state_->names; }

bool Checkpoint::contains(std::string_view name) const {
  return state_->find_entry(name) != nullptr;
}

Result<TensorRef> Checkpoint::find(std::string_view name) const {
  const IndexEntry* entry = state_->find_entry(name);
  if (entry == nullptr) return not_found("the checkpoint has no tensor " + in_quotes(name));
  const Result<const SafetensorsFile*> file = state_->open_shard(entry->shard);
  if (!file.ok()) return file.status();
  return TensorRef{*file, (*file)->find(name)};
}

Status Checkpoint::read_bytes(const TensorRef& tensor, std::uint64_t offset_bytes,
                              std::span<std::byte> out) const {
  const Status status = tensor.file->read_range(*tensor.info, offset_bytes, out);
  if (status.ok()) state_->bytes_read += out.size();
  return status;
}

std::uint64_t Checkpoint::bytes_read() const { return state_->bytes_read; }

std::vector<std::string> Checkpoint::opened_shards() const {
  const std::lock_guard lock(state_->mutex);
  std::vector<std::string> names;
  for (std::size_t i = 0; i < state_->shards.size(); ++i) {
    if (state_->shards[i] != nullptr) names.push_back(state_->index.shard_names[i]);
  }
  return names;
}

std::vector<std::string> Checkpoint::unlisted_names() const {
  const std::lock_guard lock(state_->mutex);
  return state_->unlisted_names;
}

}  // namespace spindle::model
