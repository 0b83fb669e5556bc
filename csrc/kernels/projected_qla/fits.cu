#include "shapes.cuh"

namespace vista::cuda {

bool projected_qla_fits(ProjectedQla which, const ProjectedQlaParams& params) {
  const auto nothing = [](auto) {};
  switch (which) {
    case ProjectedQla::kState: return choose_instance<StateInstances>(params, nothing);
    case ProjectedQla::kApply: return choose_instance<ApplyInstances>(params, nothing);
    case ProjectedQla::kStateBackward: return choose_instance<StateBackwardInstances>(params, nothing);
    case ProjectedQla::kApplyBackward: return choose_instance<ApplyBackwardInstances>(params, nothing);
  }
  return false;
}

}  // namespace vista::cuda
