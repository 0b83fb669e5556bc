#include "rms_norm.h"

#include <cmath>
#include <vector>

#include "vista/sglu.h"

namespace vista {
namespace {

constexpr int64_t kTaskRows = 64;

Tensor rms_norm_backward_cpu(Tensor grad_rows, Tensor x, double norm_eps) {
  check_rms_norm("rms_norm_backward", grad_rows, x, norm_eps);
  x = torch::stable::contiguous(x);
  grad_rows = torch::stable::contiguous(grad_rows);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  const int64_t dim = x.size(1), bytes = dim * static_cast<int64_t>(x.element_size());
  const DType dtype = kernel_dtype(x.scalar_type());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const auto* grads = static_cast<const char*>(grad_rows.const_data_ptr());
  auto* to = static_cast<char*>(grad_x.mutable_data_ptr());
  torch::stable::parallel_for(0, x.size(0), kTaskRows, [&](int64_t begin, int64_t end) {
    std::vector<float> inverse(end - begin);
    const int64_t at = begin * bytes;
    const cpu::SgluKernels& kernels = cpu::sglu_kernels();
    // The rows divided go where the result will be: nobody reads them.
    kernels.normalize(dtype, end - begin, dim, static_cast<float>(norm_eps), from + at, to + at, inverse.data());
    for (float& factor : inverse)
      if (std::isinf(factor)) factor = 0.f;  // zeros without eps pull nothing
    kernels.grad_rows(dtype, end - begin, dim, inverse.data(), grads + at, nullptr, from + at, nullptr, to + at);
  });
  return grad_x;
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) { m.impl("rms_norm_backward", TORCH_BOX(&vista::rms_norm_backward_cpu)); }
