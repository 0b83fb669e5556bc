#include "rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "vista/rms_norm.h"
#include "vista/sglu.h"

namespace vista {
namespace {

constexpr int64_t kTaskRows = 64;
constexpr int64_t kSumRows = 64;  // whose gradients of the weight are added up in float32

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

Tensor weighted_rms_norm_cpu(Tensor x, Tensor weight, double norm_eps) {
  check_weighted_rms_norm("weighted_rms_norm", x, weight, norm_eps);
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  Tensor out = torch::stable::new_empty(x, x.sizes());
  torch::stable::parallel_for(0, x.size(0), kTaskRows, [&](int64_t begin, int64_t end) {
    cpu::rms_norm_kernels().forward(kernel_dtype(x.scalar_type()), end - begin, x.size(1), static_cast<float>(norm_eps),
                                    row_at(x, begin), floats(weight), mutable_row_at(out, begin));
  });
  return out;
}

std::tuple<Tensor, Tensor> weighted_rms_norm_backward_cpu(Tensor grad_out, Tensor x, Tensor weight, double norm_eps) {
  const char* op = "weighted_rms_norm_backward";
  check_weighted_rms_norm(op, x, weight, norm_eps);
  check_grad_like(op, "grad_out", grad_out, x);
  grad_out = torch::stable::contiguous(grad_out);
  x = torch::stable::contiguous(x);
  const Tensor factors = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  const int64_t rows = x.size(0), dim = x.size(1);
  // The rows of a sum are the same whatever the threads.
  const int64_t sums = (rows + kSumRows - 1) / kSumRows;
  std::vector<float> parts(sums * dim);
  torch::stable::parallel_for(0, sums, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * kSumRows, count = std::min(kSumRows, rows - begin);
      cpu::rms_norm_kernels().backward(kernel_dtype(x.scalar_type()), count, dim, static_cast<float>(norm_eps),
                                       row_at(grad_out, begin), row_at(x, begin), floats(factors),
                                       mutable_row_at(grad_x, begin), parts.data() + i * dim);
    }
  });
  std::vector<double> totals(dim);
  for (int64_t i = 0; i < sums; ++i)
    for (int64_t j = 0; j < dim; ++j) totals[j] += parts[i * dim + j];
  Tensor grad_weight = torch::stable::new_empty(x, {dim}, ScalarType::Float);
  std::copy(totals.begin(), totals.end(), mutable_floats(grad_weight));
  return {grad_x, in_dtype_of(weight, grad_weight)};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("rms_norm_backward", TORCH_BOX(&vista::rms_norm_backward_cpu));
  m.impl("weighted_rms_norm", TORCH_BOX(&vista::weighted_rms_norm_cpu));
  m.impl("weighted_rms_norm_backward", TORCH_BOX(&vista::weighted_rms_norm_backward_cpu));
}
