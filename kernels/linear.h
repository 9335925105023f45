#pragma once
// y = x W^T + bias for weights that are packed once and applied to any number of rows.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/core/cpu_context.h"
#include "kernels/core/dtype.h"
#include "kernels/core/status.h"
#include "kernels/core/tensor_view.h"

namespace spindle {
class CudaContext;
}

namespace spindle::kernels {

enum class LinearMath : std::uint8_t {
  // fp32 fma chain over k ascending, one per output: bitwise independent of the number of rows and
  // of threads. 16-bit weights stay 16-bit in memory and are widened exactly.
  kF32,
  // Activations rounded to bf16, bf16 weights, fp32 accumulation by oneDNN: for hosts with AMX or
  // avx512_bf16. NOT batch-invariant. Only in builds with oneDNN.
  kBF16,
};

// Borrowed during pack() only.
struct WeightSource {
  const void* data = nullptr;  // [n_out, n_in] row-major, as in a model file
  DType dtype = DType::kF32;
  std::int64_t n_out = 0;
};

// A weight matrix in the layout of its kernel. Owns its copy; the source can be unmapped after.
//
// Thread-safety: immutable after pack; several contexts may apply it at once (in kBF16 mode calls
// are serialised inside).
class PackedLinear {
 public:
  static constexpr std::int64_t kMaxElements = std::int64_t{1} << 36;

  // Concatenates the sources along n_out (fused q+k+v, gate+up). Sources of different types are
  // widened to f32. `bias` is empty or has one value per output, added after the chain.
  // kInvalidArgument for bad sizes, kResourceExhausted when memory is short, kUnimplemented for
  // kBF16 without oneDNN.
  static Result<PackedLinear> pack(const CpuContext& context, std::span<const WeightSource> sources,
                                   std::int64_t n_in, LinearMath math = LinearMath::kF32,
                                   std::span<const float> bias = {});
  ~PackedLinear();
  PackedLinear(PackedLinear&&) noexcept;
  PackedLinear& operator=(PackedLinear&&) noexcept;

  std::int64_t n_in() const;
  std::int64_t n_out() const;
  LinearMath math() const;
  // The type the weights are held in.
  DType dtype() const;
  // Memory held by the packed weights and bias.
  std::size_t bytes() const;

 private:
  friend void linear(const CpuContext& context, const PackedLinear& weights, ConstRows x, Rows y);
  friend void linear_slice(const CpuContext& context, const PackedLinear& weights,
                           std::int64_t k_begin, ConstRows x, Rows y);
  struct Body;
  explicit PackedLinear(std::unique_ptr<Body> body);

  std::unique_ptr<Body> body_;
};

// `y` must not overlap `x`. Zero rows are allowed.
void linear(const CpuContext& context, const PackedLinear& weights,
            ConstRows x,  // [n_tokens, n_in]
            Rows y);      // [n_tokens, n_out]

// y = x W[:, k_begin : k_begin + width)^T without the bias: what the inputs of that range, one head
// of an output projection for instance, add to y. The fp32 chain of kF32 over the range, in both
// maths (kBF16 rounds x to bf16), hence always independent of the number of rows. `y` must not
// overlap `x`. Zero rows are allowed.
void linear_slice(const CpuContext& context, const PackedLinear& weights, std::int64_t k_begin,
                  ConstRows x,  // [n_tokens, width]
                  Rows y);      // [n_tokens, n_out]

// The forms of a product on a device, for tune_linear().
enum LinearForms : std::uint8_t {
  kLinearBf16 = 1,    // linear() with bf16 output
  kLinearF32 = 2,     // linear() with fp32 output
  kLinearAdd = 4,     // linear_add()
  kLinearSwiglu = 8,  // linear_swiglu()
  kAllLinearForms = 15,
};

// A weight matrix on a device, bf16 row-major [n_out, n_in]; other types are rounded to bf16 when
// they are uploaded. Move-only; the context outlives it.
//
// Products: cuBLASLt with fp32 accumulation, the algorithm timed once per (shape, bucket of rows)
// by tune_linear(); few rows take a kernel of our own that reads each weight once (a GEMV). Results
// depend in their last bits on the algorithm, hence on the number of rows and on the tuning.
class DeviceLinear {
 public:
  // Concatenates host sources along n_out (fused q+k+v, gate+up). RESOURCE_EXHAUSTED when the
  // device has no room, INVALID_ARGUMENT for bad sizes; n_in must be a multiple of 8. Synchronises.
  static Result<DeviceLinear> upload(const CudaContext& context,
                                     std::span<const WeightSource> sources, std::int64_t n_in);
  ~DeviceLinear();
  DeviceLinear(DeviceLinear&&) noexcept;
  DeviceLinear& operator=(DeviceLinear&&) noexcept;

  std::int64_t n_in() const;
  std::int64_t n_out() const;
  std::size_t bytes() const;
  const Bf16* data() const;  // device
  // Takes the choices that tune_linear() made for a weight of the same shape.
  void copy_tuning(const DeviceLinear& tuned);
  // What computes `form` for so many rows: "own 16x8, 9 stages", "cuBLASLt 66, tile 20,
  // split 2".
  std::string choice(const CudaContext& context, LinearForms form, std::int64_t n_rows) const;

 private:
  friend class DeviceLinearAccess;
  struct Body;
  explicit DeviceLinear(std::unique_ptr<Body> body);

  std::unique_ptr<Body> body_;
};

// Chooses and times cuBLASLt algorithms and the kernels for few rows, for every bucket of rows up
// to max_rows (1, 2, 4, 8, 16, 32, 64, 128, ...) and for each of `forms` (an or of LinearForms),
// and remembers them in the weight. Synchronises; called once at load, for one weight of each
// shape. Without it few rows take our own kernel and others the library's first choice, asked for
// at every call. RESOURCE_EXHAUSTED when there is no room for its temporary operands.
Status tune_linear(const CudaContext& context, DeviceLinear& weights, std::int64_t max_rows,
                   unsigned forms = kAllLinearForms);

// In all products: rows of x start at multiples of 16 bytes. Rows of y may start anywhere; at
// multiples of 16 bytes more algorithms can be taken.

// y = x W^T. All device memory; rows may lie apart. Zero rows are allowed.
void linear(const CudaContext& context, const DeviceLinear& weights,
            ConstBf16Rows x,  // [n_tokens, n_in]
            Bf16Rows y);      // [n_tokens, n_out]
// y = x W^T in fp32 (logits).
void linear(const CudaContext& context, const DeviceLinear& weights, ConstBf16Rows x, Rows y);
// y += x W^T in fp32 (the residual stream).
void linear_add(const CudaContext& context, const DeviceLinear& weights, ConstBf16Rows x, Rows y);
// out = swiglu(x W^T) for a fused gate+up weight, rounded once; few rows need no intermediate.
void linear_swiglu(const CudaContext& context, const DeviceLinear& gate_up,
                   ConstBf16Rows x,  // [n_tokens, n_in]
                   Rows scratch,     // [n_tokens, 2 * inter]
                   Bf16Rows out);    // [n_tokens, inter]

}  // namespace spindle::kernels
