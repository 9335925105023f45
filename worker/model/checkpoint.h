#pragma once
// The weights of a model folder: one model.safetensors, or shards named by
// model.safetensors.index.json.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/status.h"
#include "worker/model/safetensors.h"

namespace spindle::model {

inline constexpr std::uint64_t kMaxIndexBytes = 64 << 20;
inline constexpr std::size_t kMaxCheckpointTensors = 65'536;
inline constexpr std::size_t kMaxShards = 4'096;

// Points into the Checkpoint that gave it and is valid as long as that lives.
struct TensorRef {
  const SafetensorsFile* file = nullptr;
  const TensorInfo* info = nullptr;
};

// Owns the open shards. Opening reads the index alone (or the header of the single file); a shard
// is opened, and its header checked, when a tensor in it is first asked for, so a rank touches only
// the files of its own layers. A file named model.safetensors.index.json is preferred when both
// exist.
//
// Thread-safety: const methods may be called by many threads at once (opening a shard is
// serialised).
// Invariant: a name given by find() is present in the shard that the index says.
class Checkpoint {
 public:
  static Result<Checkpoint> open(const std::filesystem::path& model_dir);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  // Every tensor name of the checkpoint, sorted; opens no shard.
  const std::vector<std::string>& names() const;
  bool contains(std::string_view name) const;
  // kNotFound for an unknown name. Opens the tensor's shard if need be.
  Result<TensorRef> find(std::string_view name) const;
  // out.size() bytes from `offset_bytes` within the tensor.
  Status read_bytes(const TensorRef& tensor, std::uint64_t offset_bytes,
                    std::span<std::byte> out) const;

  // Tensor bytes read so far (headers and the index do not count).
  std::uint64_t bytes_read() const;
  // File names of the shards opened so far.
  std::vector<std::string> opened_shards() const;
  // Tensors found in opened shards that the index does not name at all.
  std::vector<std::string> unlisted_names() const;

 private:
  struct State;
  explicit Checkpoint(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace spindle::model
