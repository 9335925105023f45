#include "worker/model/safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "worker/model/json_stream.h"
#include "worker/model/printable.h"

namespace spindle::model {
namespace {

constexpr std::string_view kMetadataName = "__metadata__";

struct DTypeRow {
  FileDType dtype;
  std::string_view name;
  unsigned bits;
};

constexpr std::array kDTypes = {
    DTypeRow{FileDType::kBool, "BOOL", 8},      DTypeRow{FileDType::kF4, "F4", 4},
    DTypeRow{FileDType::kF6E2M3, "F6_E2M3", 6}, DTypeRow{FileDType::kF6E3M2, "F6_E3M2", 6},
    DTypeRow{FileDType::kU8, "U8", 8},          DTypeRow{FileDType::kI8, "I8", 8},
    DTypeRow{FileDType::kF8E5M2, "F8_E5M2", 8}, DTypeRow{FileDType::kF8E4M3, "F8_E4M3", 8},
    DTypeRow{FileDType::kF8E8M0, "F8_E8M0", 8}, DTypeRow{FileDType::kI16, "I16", 16},
    DTypeRow{FileDType::kU16, "U16", 16},       DTypeRow{FileDType::kF16, "F16", 16},
    DTypeRow{FileDType::kBF16, "BF16", 16},     DTypeRow{FileDType::kI32, "I32", 32},
    DTypeRow{FileDType::kU32, "U32", 32},       DTypeRow{FileDType::kF32, "F32", 32},
    DTypeRow{FileDType::kC64, "C64", 64},       DTypeRow{FileDType::kF64, "F64", 64},
    DTypeRow{FileDType::kI64, "I64", 64},       DTypeRow{FileDType::kU64, "U64", 64},
};

const DTypeRow& row_of(FileDType dtype) {
  return *std::find_if(kDTypes.begin(), kDTypes.end(),
                       [&](const DTypeRow& row) { return row.dtype == dtype; });
}

// Bytes of a tensor, or nullopt when the product overflows or does not end on a byte.
std::optional<std::uint64_t> tensor_bytes(const TensorInfo& tensor) {
  std::uint64_t bits = file_dtype_bits(tensor.dtype);
  for (const std::int64_t dim : tensor.shape) {
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(dim), &bits)) return std::nullopt;
  }
  if (bits % 8 != 0) return std::nullopt;
  return bits / 8;
}

Status check_tensor(const TensorInfo& tensor, bool has_dtype, bool has_shape, bool has_offsets) {
  if (!has_dtype) return invalid_argument("\"dtype\" is missing");
  if (!has_shape) return invalid_argument("\"shape\" is missing");
  if (!has_offsets) return invalid_argument("\"data_offsets\" is missing");
  if (tensor.begin > tensor.end) {
    return invalid_argument("data_offsets end before they begin: [" + std::to_string(tensor.begin) +
                            ", " + std::to_string(tensor.end) + "]");
  }
  const std::optional<std::uint64_t> bytes = tensor_bytes(tensor);
  if (!bytes || *bytes != tensor.n_bytes()) {
    return invalid_argument("data_offsets hold " + std::to_string(tensor.n_bytes()) +
                            " bytes, but " + std::string(file_dtype_name(tensor.dtype)) + " " +
                            shape_text(tensor.shape) + " needs " +
                            (bytes ? std::to_string(*bytes) : "an impossible number"));
  }
  return ok_status();
}

// Tensors are in the order of their bytes.
Status check_coverage(const std::vector<TensorInfo>& tensors, std::uint64_t data_bytes) {
  std::uint64_t covered = 0;
  std::string before = "the header";
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin != covered) {
      return invalid_argument("tensor " + in_quotes(tensor.name) + " begins at byte " +
                              std::to_string(tensor.begin) +
                              (tensor.begin < covered ? ", overlapping " : ", a gap after ") +
                              before + ", which ends at " + std::to_string(covered));
    }
    covered = tensor.end;
    before = "tensor " + in_quotes(tensor.name);
  }
  if (covered != data_bytes) {
    return invalid_argument("tensors cover " + std::to_string(covered) + " bytes, but " +
                            std::to_string(data_bytes) + " follow the header");
  }
  return ok_status();
}

Status check_unique(std::vector<std::string>& names, std::string_view what) {
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice == names.end()) return ok_status();
  return invalid_argument(std::string(what) + " " + in_quotes(*twice) + " occurs twice");
}

}  // namespace

// Follows the two allowed forms: {"__metadata__": {key: string}, name: {"dtype": string,
// "shape": [n, ...], "data_offsets": [n, n]}}.
class SafetensorsHeaderParser::Sink final : public JsonSink {
 public:
  std::vector<TensorInfo> take() { return std::move(tensors_); }

  Status on_object_begin() override {
    if (place_ == Place::kStart) return move_to(Place::kRoot);
    if (place_ == Place::kMetadataValue) return move_to(Place::kMetadata);
    if (place_ == Place::kTensorValue) return move_to(Place::kTensor);
    return unexpected("an object");
  }

  Status on_object_end() override {
    if (place_ == Place::kRoot) return move_to(Place::kEnd);
    if (place_ == Place::kMetadata) {
      const Status status = check_unique(metadata_keys_, "metadata key");
      metadata_keys_.clear();
      metadata_keys_.shrink_to_fit();
      place_ = Place::kRoot;
      return status;
    }
    const Status status = check_tensor(tensor_, has_dtype_, has_shape_, has_offsets_);
    if (!status.ok()) return in_tensor(status);
    tensors_.push_back(std::move(tensor_));
    return move_to(Place::kRoot);
  }

  Status on_array_begin() override {
    if (!in_array_ && (place_ == Place::kShape || place_ == Place::kOffsets)) {
      numbers_.clear();
      in_array_ = true;
      return ok_status();
    }
    return unexpected("a list");
  }

  Status on_array_end() override {
    in_array_ = false;
    return place_ == Place::kShape ? end_shape() : end_offsets();
  }

  Status on_key(std::string_view key) override {
    if (place_ == Place::kRoot) return on_name(key);
    if (place_ == Place::kMetadata) return on_metadata_key(key);
    bool* seen = nullptr;
    if (key == "dtype") {
      seen = &has_dtype_;
      place_ = Place::kDType;
    } else if (key == "shape") {
      seen = &has_shape_;
      place_ = Place::kShape;
    } else if (key == "data_offsets") {
      seen = &has_offsets_;
      place_ = Place::kOffsets;
    } else {
      return in_tensor(invalid_argument("unknown field " + in_quotes(key)));
    }
    if (std::exchange(*seen, true)) {
      return in_tensor(invalid_argument(in_quotes(key) + " occurs twice"));
    }
    return ok_status();
  }

  Status on_string(std::string_view text, std::size_t) override {
    if (place_ == Place::kMetadata) return ok_status();
    if (place_ != Place::kDType) return unexpected("a string");
    const std::optional<FileDType> dtype = file_dtype_from_name(text);
    if (!dtype) return in_tensor(invalid_argument("unknown dtype " + in_quotes(text)));
    tensor_.dtype = *dtype;
    return move_to(Place::kTensor);
  }

  Status on_unsigned(std::uint64_t value) override {
    if (!in_array_) return unexpected("a number");
    if (numbers_.size() == kMaxTensorRank) {
      return in_tensor(invalid_argument(place_ == Place::kShape
                                            ? "the shape has more than " +
                                                  std::to_string(kMaxTensorRank) + " dimensions"
                                            : "data_offsets must be two numbers"));
    }
    numbers_.push_back(value);
    return ok_status();
  }

  Status on_other(std::string_view kind) override { return unexpected(kind); }

 private:
  // Where the next value or key stands.
  enum class Place {
    kStart,
    kRoot,
    kMetadataValue,
    kMetadata,
    kTensorValue,
    kTensor,
    kDType,
    kShape,
    kOffsets,
    kEnd
  };

  Status move_to(Place place) {
    place_ = place;
    return ok_status();
  }

  Status in_tensor(const Status& status) const {
    return status.with_context("tensor " + in_quotes(tensor_.name));
  }

  Status unexpected(std::string_view kind) const {
    const std::string found = ", found " + std::string(kind);
    switch (place_) {
      case Place::kMetadataValue:
      case Place::kMetadata:
        return invalid_argument("\"__metadata__\" must map names to strings" + found);
      case Place::kTensorValue:
        return in_tensor(invalid_argument("must be an object" + found));
      case Place::kDType:
        return in_tensor(invalid_argument("\"dtype\" must be a string" + found));
      case Place::kShape:
        return in_tensor(invalid_argument("\"shape\" must be a list of sizes" + found));
      case Place::kOffsets:
        return in_tensor(invalid_argument("\"data_offsets\" must be two numbers" + found));
      default:
        return invalid_argument("the header must be an object" + found);
    }
  }

  Status on_name(std::string_view name) {
    if (name == kMetadataName) {
      if (std::exchange(has_metadata_, true)) {
        return invalid_argument("\"__metadata__\" occurs twice");
      }
      return move_to(Place::kMetadataValue);
    }
    if (tensors_.size() == kMaxTensorsPerFile) {
      return too_large("more than " + std::to_string(kMaxTensorsPerFile) + " tensors");
    }
    tensor_ = TensorInfo{};
    tensor_.name = name;
    has_dtype_ = has_shape_ = has_offsets_ = false;
    return move_to(Place::kTensorValue);
  }

  Status on_metadata_key(std::string_view key) {
    if (metadata_keys_.size() == kMaxTensorsPerFile) {
      return too_large("more than " + std::to_string(kMaxTensorsPerFile) + " metadata entries");
    }
    metadata_keys_.emplace_back(key);
    return ok_status();
  }

  Status end_shape() {
    for (const std::uint64_t size : numbers_) {
      if (size > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return in_tensor(invalid_argument("a size in the shape is too large"));
      }
      tensor_.shape.push_back(static_cast<std::int64_t>(size));
    }
    return move_to(Place::kTensor);
  }

  Status end_offsets() {
    if (numbers_.size() != 2) {
      return in_tensor(invalid_argument("data_offsets must be two numbers"));
    }
    tensor_.begin = numbers_[0];
    tensor_.end = numbers_[1];
    return move_to(Place::kTensor);
  }

  Place place_ = Place::kStart;
  bool in_array_ = false;
  bool has_metadata_ = false;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  bool has_offsets_ = false;
  TensorInfo tensor_;
  std::vector<std::uint64_t> numbers_;
  std::vector<std::string> metadata_keys_;
  std::vector<TensorInfo> tensors_;
};

struct SafetensorsHeaderParser::State {
  Sink sink;
  JsonStream stream{sink, {kMaxHeaderDepth, kMaxTensorNameBytes, 64}};
};

SafetensorsHeaderParser::SafetensorsHeaderParser() : state_(std::make_unique<State>()) {}
SafetensorsHeaderParser::~SafetensorsHeaderParser() = default;

Status SafetensorsHeaderParser::feed(std::string_view chunk) { return state_->stream.feed(chunk); }

Result<std::vector<TensorInfo>> SafetensorsHeaderParser::finish(std::uint64_t data_bytes) {
  Status status = state_->stream.finish();
  if (!status.ok()) return status;
  std::vector<TensorInfo> tensors = state_->sink.take();
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  status = check_coverage(tensors, data_bytes);
  if (!status.ok()) return status;
  return tensors;
}

Result<std::vector<std::uint32_t>> sort_by_name(const std::vector<TensorInfo>& tensors) {
  std::vector<std::uint32_t> order(tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](std::uint32_t a, std::uint32_t b) { return tensors[a].name < tensors[b].name; });
  const auto twice = std::adjacent_find(
      order.begin(), order.end(),
      [&](std::uint32_t a, std::uint32_t b) { return tensors[a].name == tensors[b].name; });
  if (twice == order.end()) return order;
  return invalid_argument("tensor " + in_quotes(tensors[*twice].name) + " occurs twice");
}

std::string_view file_dtype_name(FileDType dtype) { return row_of(dtype).name; }

unsigned file_dtype_bits(FileDType dtype) { return row_of(dtype).bits; }

std::optional<FileDType> file_dtype_from_name(std::string_view name) {
  for (const DTypeRow& row : kDTypes) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

std::optional<DType> weight_dtype(FileDType dtype) {
  switch (dtype) {
    case FileDType::kF32:
      return DType::kF32;
    case FileDType::kF16:
      return DType::kF16;
    case FileDType::kBF16:
      return DType::kBF16;
    default:
      return std::nullopt;
  }
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace spindle::model
