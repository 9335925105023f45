#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "kernels/core/check.h"
#include "kernels/cuda/chained_launch.cuh"
#include "kernels/embedding.h"

namespace spindle::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // values a thread writes at once

__device__ float widened(float value) { return value; }
__device__ float widened(__half value) { return __half2float(value); }
__device__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
struct alignas(kVector * sizeof(T)) Vector {
  T values[kVector];
};

template <typename T>
struct Arguments {
  const T* table;
  const std::int32_t* ids;
  float* out;
  std::int64_t table_stride;
  std::int64_t n_table;
  std::int64_t out_stride;
  std::int64_t width;
  std::int64_t n_rows;
};

// Values of a row by x, rows by y. kAtOnce is kVector or 1.
template <typename T, int kAtOnce>
__global__ __launch_bounds__(kThreads) void rows_by_id(const Arguments<T> a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t at = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) * kAtOnce;
  if (at >= a.width) return;
  for (std::int64_t row = blockIdx.y; row < a.n_rows; row += gridDim.y) {
    const std::int64_t id = a.ids[row];
    float* out = a.out + row * a.out_stride + at;
    const bool known = id >= 0 && id < a.n_table;
    const T* in = a.table + (known ? id : 0) * a.table_stride + at;
    float values[kAtOnce];
    if constexpr (kAtOnce == kVector) {
      const auto vector = *reinterpret_cast<const Vector<T>*>(in);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = widened(vector.values[i]);
    } else {
      values[0] = widened(in[0]);
    }
    if (!known) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) values[i] = __int_as_float(0x7fc00000);
    }
    if constexpr (kAtOnce == kVector) {
      *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
    } else {
      out[0] = values[0];
    }
  }
}

bool aligned(const void* data, std::size_t n_bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % n_bytes == 0;
}

template <typename T>
void launch(const CudaContext& context, const char* name, const Arguments<T>& a) {
  const bool vectors = a.width % kVector == 0 && a.table_stride % kVector == 0 &&
                       a.out_stride % kVector == 0 && aligned(a.table, kVector * sizeof(T)) &&
                       aligned(a.out, sizeof(float4));
  const std::int64_t per_block = kThreads * (vectors ? kVector : 1);
  const dim3 grid(static_cast<unsigned>((a.width + per_block - 1) / per_block),
                  static_cast<unsigned>(std::min<std::int64_t>(a.n_rows, 65535)));
  launch_chained(context, name, vectors ? rows_by_id<T, kVector> : rows_by_id<T, 1>, grid,
                 dim3(kThreads), 0, a);
}

template <typename T>
void embed(const CudaContext& context, const EmbeddingTable& table, const std::int32_t* ids,
           Rows out) {
  launch<T>(context, "embedding",
            {static_cast<const T*>(table.data), ids, out.data, table.hidden, table.n_vocab,
             out.stride, out.width, out.n_rows});
}

}  // namespace

void embedding(const CudaContext& context, const EmbeddingTable& table, const std::int32_t* ids,
               Rows out) {
  CHECK(out.width == table.hidden && (table.n_vocab > 0 || out.n_rows == 0), "embedding shapes");
  if (out.n_rows == 0 || out.width == 0) return;
  switch (table.dtype) {
    case DType::kF32:
      return embed<float>(context, table, ids, out);
    case DType::kF16:
      return embed<__half>(context, table, ids, out);
    case DType::kBF16:
      return embed<__nv_bfloat16>(context, table, ids, out);
  }
}

void gather_rows(const CudaContext& context, ConstRows rows, const std::int32_t* index, Rows out) {
  CHECK(out.width == rows.width && (rows.n_rows > 0 || out.n_rows == 0), "gather shapes");
  if (out.n_rows == 0 || out.width == 0) return;
  launch<float>(
      context, "gather rows",
      {rows.data, index, out.data, rows.stride, rows.n_rows, out.stride, out.width, out.n_rows});
}

}  // namespace spindle::kernels
