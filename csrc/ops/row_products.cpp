// Products of rows on the CPU: in the processor's tiles, else torch's.
#include "row_products.h"

#include <algorithm>
#include <array>

#include "vista/row_products.h"

namespace vista {
namespace {

constexpr int64_t kTaskRows = 128;
// Of an outer product: as few as are worth a sum of their own, and as many sums at most, whatever the threads.
constexpr int64_t kLeastRows = 1024, kMostSums = 16;

class Room {
 public:
  explicit Room(int64_t bytes) : data_(std::aligned_alloc(64, std::max<int64_t>(bytes, 64)), &std::free) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

bool has_tiles(const Tensor& x) { return cpu::row_products() != nullptr && x.scalar_type() != ScalarType::Half; }

Tensor row_product_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias, bool transposed) {
  check_row_product("row_product", x, weight, bias, transposed);
  if (!has_tiles(x)) {
    const Tensor right = transposed ? weight : torch::stable::transpose(weight, 0, 1);
    Tensor out = in_dtype_of(x, torch::stable::matmul(x, right));
    return bias.has_value() ? torch::stable::subtract(out, *bias, -1.) : out;
  }
  x = torch::stable::contiguous(x);
  weight = torch::stable::contiguous(weight);
  const cpu::RowProducts& products = *cpu::row_products();
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(transposed ? 1 : 0);
  const DType dtype = kernel_dtype(x.scalar_type());
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  if (bias.has_value()) bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  const Room packed(products.packed_bytes(dtype, depth, columns));
  products.pack(dtype, depth, columns, weight.const_data_ptr(), transposed, packed.data());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t row_bytes = columns * out.element_size();
  torch::stable::parallel_for(0, rows, kTaskRows, [&](int64_t begin, int64_t end) {
    const Room scratch(products.times_scratch_bytes(dtype, depth));
    products.times(dtype, end - begin, depth, columns, row_at(x, begin), packed.data(),
                   bias.has_value() ? floats(*bias) : nullptr, to + begin * row_bytes, rows * row_bytes >= kStreamBytes,
                   scratch.data());
  });
  return out;
}

Tensor outer_product_cpu(Tensor a, Tensor b) {
  check_outer_product("outer_product", a, b);
  if (!has_tiles(a)) return in_dtype_of(a, torch::stable::matmul(torch::stable::transpose(a, 0, 1), b));
  a = torch::stable::contiguous(a);
  b = torch::stable::contiguous(b);
  const cpu::RowProducts& products = *cpu::row_products();
  const int64_t rows = a.size(0), left = a.size(1), right = b.size(1);
  const DType dtype = kernel_dtype(a.scalar_type());
  const int64_t each = (std::max(kLeastRows, (rows + kMostSums - 1) / kMostSums) + 255) / 256 * 256;
  const int64_t sums = std::max<int64_t>(1, (rows + each - 1) / each);
  Tensor parts = torch::stable::new_zeros(a, {sums, left, right}, ScalarType::Float);
  float* part = mutable_floats(parts);
  torch::stable::parallel_for(0, sums, 1, [&](int64_t first, int64_t last) {
    const Room scratch(products.outer_scratch_bytes(dtype, left, right));
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * each, count = std::min(each, rows - begin);
      if (count > 0)
        products.outer(dtype, count, left, right, row_at(a, begin), row_at(b, begin), part + i * left * right,
                       scratch.data());
    }
  });
  const std::array<int64_t, 1> over{0};
  return in_dtype_of(a, sums == 1 ? torch::stable::view(parts, {left, right}) : torch::stable::sum(parts, over, false));
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("row_product", TORCH_BOX(&vista::row_product_cpu));
  m.impl("outer_product", TORCH_BOX(&vista::outer_product_cpu));
}
