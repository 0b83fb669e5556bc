#include "sglu.h"

#include <algorithm>
#include <utility>

#include "vista/sglu.h"

namespace vista {
namespace {

// Rows that are worked on at a time: what lies between the products stays in the caches.
constexpr int64_t kBlockRows = 1024, kTaskRows = 64;

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor times(const Tensor& a, const Tensor& b) { return in_dtype_of(a, torch::stable::matmul(a, b)); }

// A call on the CPU. The products are torch's, so that the last bits of a row may depend on how many rows there are.
class Call {
 public:
  Call(const char* op, Tensor& x, Tensor& up, Tensor& gate, Tensor& down, std::optional<double> norm_eps)
      : norm_eps_(norm_eps) {
    check_sglu(op, x, up, gate, down, norm_eps);
    for (Tensor* tensor : {&x, &up, &gate, &down}) *tensor = torch::stable::contiguous(*tensor);
    dtype_ = kernel_dtype(x.scalar_type());
  }

  // f(first row, rows) for each block.
  template <typename F>
  void for_blocks(const Tensor& x, const F& f) {
    for (int64_t begin = 0; begin < x.size(0); begin += kBlockRows) f(begin, std::min(kBlockRows, x.size(0) - begin));
  }

  static Tensor rows_of(Tensor tensor, int64_t begin, int64_t rows) {
    return torch::stable::narrow(tensor, 0, begin, rows);
  }

  // The rows divided by their root mean square; without norm as they are.
  Tensor normalized(const Tensor& x) {
    if (!norm_eps_.has_value()) return x;
    Tensor y = torch::stable::new_empty(x, x.sizes());
    inverse_.resize(x.size(0));
    const int64_t dim = x.size(1);
    run(x.size(0), [&](int64_t begin, int64_t rows) {
      cpu::sglu_kernels().normalize(dtype_, rows, dim, static_cast<float>(*norm_eps_), at(x, begin), at(y, begin),
                                    inverse_.data() + begin);
    });
    return y;
  }

  Tensor multiply(const Tensor& a, const Tensor& b) {
    Tensor out = torch::stable::new_empty(a, a.sizes());
    run(a.size(0), [&](int64_t begin, int64_t rows) {
      cpu::sglu_kernels().multiply(dtype_, rows * a.size(1), at(a, begin), at(b, begin), at(out, begin));
    });
    return out;
  }

  void add(const Tensor& a, const Tensor& b, Tensor& out) {
    run(a.size(0), [&](int64_t begin, int64_t rows) {
      cpu::sglu_kernels().add(dtype_, rows * a.size(1), at(a, begin), at(b, begin), at(out, begin));
    });
  }

  void gradients(const Tensor& grad, const Tensor& u, const Tensor& v, Tensor& up_rows, Tensor& gate_rows,
                 Tensor& hidden) {
    run(u.size(0), [&](int64_t begin, int64_t rows) {
      cpu::sglu_kernels().gradients(dtype_, rows, u.size(1), inverse(begin), at(grad, begin), at(u, begin),
                                    at(v, begin), at(up_rows, begin), at(gate_rows, begin), at(hidden, begin));
    });
  }

  void grad_rows(const Tensor& a, const Tensor& b, const Tensor& x, const Tensor* grad_out, Tensor& grad_x) {
    run(x.size(0), [&](int64_t begin, int64_t rows) {
      cpu::sglu_kernels().grad_rows(dtype_, rows, x.size(1), inverse(begin), at(a, begin), at(b, begin), at(x, begin),
                                    grad_out == nullptr ? nullptr : at(*grad_out, begin), at(grad_x, begin));
    });
  }

  static const void* at(const Tensor& tensor, int64_t row) {
    return static_cast<const char*>(tensor.const_data_ptr()) + row * tensor.size(1) * tensor.element_size();
  }
  static void* at(Tensor& tensor, int64_t row) {
    return static_cast<char*>(tensor.mutable_data_ptr()) + row * tensor.size(1) * tensor.element_size();
  }

  template <typename F>
  static void run(int64_t rows, const F& f) {
    torch::stable::parallel_for(0, rows, kTaskRows, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
  }

 private:
  std::optional<double> norm_eps_;
  DType dtype_;
  std::vector<float> inverse_;  // of the block's rows

  const float* inverse(int64_t begin) const { return norm_eps_.has_value() ? inverse_.data() + begin : nullptr; }
};

Tensor sglu_cpu(Tensor x, Tensor up, Tensor gate, Tensor down, std::optional<double> norm_eps, bool residual) {
  Call call("sglu", x, up, gate, down, norm_eps);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  call.for_blocks(x, [&](int64_t begin, int64_t rows) {
    const Tensor from = Call::rows_of(x, begin, rows), y = call.normalized(from);
    const Tensor hidden = call.multiply(times(y, transposed(up)), times(y, transposed(gate)));
    const Tensor result = times(hidden, transposed(down));
    Tensor to = Call::rows_of(out, begin, rows);
    if (residual)
      call.add(result, from, to);
    else
      torch::stable::copy_(to, result);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sglu_backward_cpu(Tensor grad_out, Tensor x, Tensor up, Tensor gate,
                                                             Tensor down, std::optional<double> norm_eps,
                                                             bool residual) {
  const char* op = "sglu_backward";
  Call call(op, x, up, gate, down, norm_eps);
  check_sglu_grad(op, grad_out, x);
  grad_out = torch::stable::contiguous(grad_out);
  const int64_t total = x.size(0), width = up.size(0);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor up_rows = torch::stable::new_empty(x, {total, width}), gate_rows = torch::stable::new_empty(x, {total, width});
  Tensor hidden = torch::stable::new_empty(x, {total, width});
  call.for_blocks(x, [&](int64_t begin, int64_t rows) {
    const Tensor from = Call::rows_of(x, begin, rows), grad = Call::rows_of(grad_out, begin, rows);
    const Tensor y = call.normalized(from);
    Tensor of_up = Call::rows_of(up_rows, begin, rows), of_gate = Call::rows_of(gate_rows, begin, rows);
    Tensor product = Call::rows_of(hidden, begin, rows), to = Call::rows_of(grad_x, begin, rows);
    call.gradients(times(grad, down), times(y, transposed(up)), times(y, transposed(gate)), of_up, of_gate, product);
    call.grad_rows(times(of_up, up), times(of_gate, gate), from, residual ? &grad : nullptr, to);
  });
  return {grad_x, up_rows, gate_rows, hidden};
}

Tensor gated_product_cpu(Tensor uv) {
  const int64_t hidden = check_gated("gated_product", uv);
  uv = torch::stable::contiguous(uv);
  Tensor out = torch::stable::new_empty(uv, {uv.size(0), hidden});
  Call::run(uv.size(0), [&](int64_t begin, int64_t rows) {
    cpu::sglu_kernels().gate(kernel_dtype(uv.scalar_type()), rows, hidden, Call::at(std::as_const(uv), begin),
                             Call::at(out, begin));
  });
  return out;
}

Tensor gated_product_backward_cpu(Tensor grad_out, Tensor uv) {
  const char* op = "gated_product_backward";
  const int64_t hidden = check_gated(op, uv);
  check_matrix(op, "grad_out", grad_out, uv, uv.size(0), hidden);
  grad_out = torch::stable::contiguous(grad_out);
  uv = torch::stable::contiguous(uv);
  Tensor grad_uv = torch::stable::new_empty(uv, uv.sizes());
  Call::run(uv.size(0), [&](int64_t begin, int64_t rows) {
    cpu::sglu_kernels().gate_backward(kernel_dtype(uv.scalar_type()), rows, hidden,
                                      Call::at(std::as_const(grad_out), begin), Call::at(std::as_const(uv), begin),
                                      Call::at(grad_uv, begin));
  });
  return grad_uv;
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("sglu", TORCH_BOX(&vista::sglu_cpu));
  m.impl("sglu_backward", TORCH_BOX(&vista::sglu_backward_cpu));
  m.impl("gated_product", TORCH_BOX(&vista::gated_product_cpu));
  m.impl("gated_product_backward", TORCH_BOX(&vista::gated_product_backward_cpu));
}
