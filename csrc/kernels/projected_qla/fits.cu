#include "shapes.cuh"

namespace vista::cuda {

bool projected_qla_fits(ProjectedQla which, const ProjectedQlaParams& params) {
  const auto nothing = [](auto) {};
  int most = 0;
  if (shared_bytes_of_device(most) != cudaSuccess) return false;
  switch (which) {
    case ProjectedQla::kState: return choose_instance<StateInstances>(params, most, nothing);
    case ProjectedQla::kApply: return choose_instance<ApplyInstances>(params, most, nothing);
    case ProjectedQla::kStateBackward: return choose_instance<StateBackwardInstances>(params, most, nothing);
    case ProjectedQla::kApplyBackward: return choose_instance<ApplyBackwardInstances>(params, most, nothing);
  }
  return false;
}

}  // namespace vista::cuda
