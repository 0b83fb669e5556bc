// Launching on torch's current CUDA stream, without a CUDA header: the stream comes through a weak symbol, which is
// null on a torch without CUDA, so that the same library loads in both.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "vista/cuda/cache_rows.h"
#include "vista/cuda/launch.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vista {

inline cuda::Stream current_stream(const char* op, int32_t device) {
  check(aoti_torch_get_current_cuda_stream != nullptr, op, "this torch has no CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(device, &stream) == 0, op, "cuda:", device, " has no current stream");
  return stream;
}

// `shape` says what was launched, for whoever reads the error.
inline void check_launch(const char* op, int code, const std::string& shape) {
  check(code == 0, op, "launch for ", shape, " failed: ", code == 0 ? "" : cuda::error_text(code));
}

// Runs launch(stream), which returns a cudaError_t, on the device and the current stream of `like`.
template <typename Launch>
void launch_on(const char* op, const Tensor& like, const std::string& shape, const Launch& launch) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  int code = 0;
  try {
    code = launch(current_stream(op, device));
  } catch (const std::invalid_argument& error) {  // a dtype or a size that is not built
    fail(op, error.what());
  }
  check_launch(op, code, shape);
}

// Kernels read 16 bytes at a time; a view may start anywhere.
inline Tensor packed(const Tensor& tensor) {
  Tensor rows = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
  return aligned ? rows : torch::stable::clone(rows);
}

// The tensors that a launch reads, as it can read them. They must outlive it, not the work: torch's allocator gives
// their memory to the same stream only.
class LaunchTensors {
 public:
  // A null pointer for an absent one.
  const void* read(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? keep(packed(*tensor)).const_data_ptr() : nullptr;
  }
  const float* read_floats(const std::optional<Tensor>& tensor) { return static_cast<const float*>(read(tensor)); }

 protected:
  Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

 private:
  std::vector<Tensor> kept_;
};

// A 1-d int32 or int64 array on the device of `like`. `tensor` becomes contiguous: it must outlive the result.
inline cuda::Indices device_indices(const char* op, const char* name, Tensor& tensor, const Tensor& like) {
  check_indices(op, name, tensor, like);
  tensor = torch::stable::contiguous(tensor);
  return {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
}

inline cuda::BadSlots bad_slots(IndexPolicy policy) {
  return policy == IndexPolicy::kRaise ? cuda::BadSlots::kTrap : cuda::BadSlots::kCount;
}

}  // namespace vista
