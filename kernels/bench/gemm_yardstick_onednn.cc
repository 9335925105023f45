#include <omp.h>

#include <dnnl.hpp>

#include "kernels/bench/yardsticks.h"

namespace spindle::kernels {

using dnnl::memory;

std::function<void()> onednn_f32_product(std::int64_t m, std::int64_t n, std::int64_t k) {
  omp_set_num_threads(1);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const memory::desc x({m, k}, memory::data_type::f32, memory::format_tag::ab);
  const memory::desc w({k, n}, memory::data_type::f32, memory::format_tag::any);
  const memory::desc y({m, n}, memory::data_type::f32, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), engine);
  const dnnl::matmul product(description);
  const memory source(x, engine);
  const memory weights(description.weights_desc(), engine);
  const memory target(y, engine);
  // Real values: zeros and denormals would flatter or punish the library.
  auto* values = static_cast<float*>(source.get_data_handle());
  for (std::int64_t i = 0; i < m * k; ++i) values[i] = 0.5F;
  values = static_cast<float*>(weights.get_data_handle());
  for (std::size_t i = 0; i < description.weights_desc().get_size() / sizeof(float); ++i) {
    values[i] = 0.25F;
  }
  dnnl::stream stream(engine);
  return [=]() mutable {
    product.execute(stream,
                    {{DNNL_ARG_SRC, source}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, target}});
    stream.wait();
  };
}

}  // namespace spindle::kernels
