#pragma once
// Model files written by tests: temporary folders, safetensors files with any header, tiny Llamas.

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/core/dtype.h"

namespace spindle::model {

// A folder that is removed with everything in it.
class TempDir {
 public:
  TempDir() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "spindle-model-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) ADD_FAILURE() << "cannot create " << pattern;
    path_ = pattern;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const std::string& name, std::string_view content) const {
    // A new file each time: truncating one makes some file systems flush it to disk on close.
    std::filesystem::remove(path_ / name);
    std::ofstream out(path_ / name, std::ios::binary);
    out.write(content.data(), static_cast<std::streamsize>(content.size()));
    if (!out.flush()) ADD_FAILURE() << "cannot write " << name;
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

// The bytes of a safetensors file: length, header text as given, data.
inline std::string safetensors_bytes(std::string_view header, std::string_view data,
                                     std::uint64_t header_length) {
  std::string out(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) out[i] = static_cast<char>((header_length >> (8 * i)) & 0xff);
  return out.append(header).append(data);
}
inline std::string safetensors_bytes(std::string_view header, std::string_view data) {
  return safetensors_bytes(header, data, header.size());
}

struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

inline std::string safetensors_header(std::span<const FileTensor> tensors) {
  std::string header = R"({"__metadata__":{"format":"pt"})";
  std::size_t at = 0;
  for (const FileTensor& tensor : tensors) {
    header += ",\"" + tensor.name + R"(":{"dtype":")" + tensor.dtype + R"(","shape":[)";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      header += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
    }
    header += R"(],"data_offsets":[)" + std::to_string(at) + "," +
              std::to_string(at + tensor.bytes.size()) + "]}";
    at += tensor.bytes.size();
  }
  return header + "}";
}

inline std::string safetensors_file(std::span<const FileTensor> tensors) {
  std::string data;
  for (const FileTensor& tensor : tensors) data += tensor.bytes;
  return safetensors_bytes(safetensors_header(tensors), data);
}

// A tensor of `dtype` whose element i is (base + i) / 8, exact in every type for small values.
inline FileTensor counting_tensor(const std::string& name, DType dtype,
                                  const std::vector<std::int64_t>& shape, int base) {
  FileTensor tensor{name,
                    dtype == DType::kF32   ? "F32"
                    : dtype == DType::kF16 ? "F16"
                                           : "BF16",
                    shape, ""};
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n *= size;
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = static_cast<float>((base + i) % 128) / 8.0f;
    std::array<char, 4> bytes{};
    if (dtype == DType::kF32) {
      std::memcpy(bytes.data(), &value, 4);
    } else {
      const std::uint16_t bits = dtype == DType::kBF16 ? f32_to_bf16(value) : f32_to_f16(value);
      std::memcpy(bytes.data(), &bits, 2);
    }
    tensor.bytes.append(bytes.data(), dtype_bytes(dtype));
  }
  return tensor;
}

// Two layers, hidden 8, 2 query heads and 1 KV head of 4, intermediate 12, vocabulary 10.
inline std::string tiny_config(bool tied) {
  return std::string(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama",
    "hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,"num_attention_heads":2,
    "num_key_value_heads":1,"head_dim":4,"vocab_size":10,"max_position_embeddings":64,
    "rms_norm_eps":1e-5,"tie_word_embeddings":)") +
         (tied ? "true" : "false") + "}";
}

inline std::vector<FileTensor> tiny_tensors(DType dtype, bool tied) {
  std::vector<FileTensor> tensors;
  const auto add = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    tensors.push_back(counting_tensor(name, dtype, shape, static_cast<int>(tensors.size())));
  };
  add("model.embed_tokens.weight", {10, 8});
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "input_layernorm.weight", {8});
    add(prefix + "self_attn.q_proj.weight", {8, 8});
    add(prefix + "self_attn.k_proj.weight", {4, 8});
    add(prefix + "self_attn.v_proj.weight", {4, 8});
    add(prefix + "self_attn.o_proj.weight", {8, 8});
    add(prefix + "post_attention_layernorm.weight", {8});
    add(prefix + "mlp.gate_proj.weight", {12, 8});
    add(prefix + "mlp.up_proj.weight", {12, 8});
    add(prefix + "mlp.down_proj.weight", {8, 12});
  }
  add("model.norm.weight", {8});
  if (!tied) add("lm_head.weight", {10, 8});
  return tensors;
}

inline std::string index_json(const std::map<std::string, std::string>& weight_map) {
  std::string text = R"({"metadata":{"total_size":1},"weight_map":{)";
  bool first = true;
  for (const auto& [tensor, file] : weight_map) {
    text += (first ? "\"" : ",\"") + tensor + "\":\"" + file + "\"";
    first = false;
  }
  return text + "}}";
}

// FNV-1a of raw bytes.
inline std::uint64_t fnv1a(std::span<const std::byte> bytes) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const std::byte b : bytes) {
    hash = (hash ^ std::to_integer<std::uint64_t>(b)) * 0x100000001b3u;
  }
  return hash;
}

}  // namespace spindle::model
