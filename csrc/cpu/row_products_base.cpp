#include "vista/cpu_isa.h"
#include "vista/row_products.h"

namespace vista::cpu {

const RowProducts* row_products() {
#ifdef VISTA_X86
  static const bool tiles = best_isa() == Isa::kAmx;
  return tiles ? &row_products_amx : nullptr;
#else
  return nullptr;
#endif
}

}  // namespace vista::cpu
