// Names that the kernels of several ops share, on every device.
#pragma once

#include <cstdint>

namespace vista {

enum class DType : int32_t { kFloat, kBFloat16, kHalf };
enum class Activation : int32_t { kSilu, kShiftedElu, kRelu, kIdentity };

}  // namespace vista
