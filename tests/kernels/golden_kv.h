#pragma once
// The reference tensors of tests/golden/golden-kv.safetensors; golden-kv.json says how each was
// computed.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/core/dtype.h"
#include "tests/source_dir.h"
#include "worker/model/safetensors.h"

namespace spindle::kernels {

class GoldenKv {
 public:
  // The whole tensor as the file stores it; T must have the size of its elements.
  template <typename T>
  std::vector<T> read(const std::string& name) const {
    const model::TensorInfo* tensor = file_.find(name);
    CHECK(tensor != nullptr, "no golden tensor " + name);
    CHECK(model::file_dtype_bits(tensor->dtype) == 8 * sizeof(T), "element type of " + name);
    std::vector<T> values(tensor->n_bytes() / sizeof(T));
    const Status status = file_.read(*tensor, std::as_writable_bytes(std::span(values)));
    CHECK(status.ok(), status.to_string());
    return values;
  }
  // An f16 tensor widened.
  std::vector<float> read_f16(const std::string& name) const {
    std::vector<float> values;
    for (const std::uint16_t bits : read<std::uint16_t>(name)) values.push_back(f16_to_f32(bits));
    return values;
  }

 private:
  model::SafetensorsFile file_ =
      model::SafetensorsFile::open(source_dir() + "/tests/golden/golden-kv.safetensors").value();
};

}  // namespace spindle::kernels
