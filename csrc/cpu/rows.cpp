// Chooses the table of row kernels for this machine.
#include "cpu/simd/rows.h"
#include "cpu/capability.h"

namespace tokenprune {

TOKENPRUNE_TABLE(RowKernels<float>, rows_f32)
TOKENPRUNE_TABLE(RowKernels<double>, rows_f64)

template <>
const RowKernels<float>& row_kernels<float>() {
  return TOKENPRUNE_CHOOSE(rows_f32);
}
template <>
const RowKernels<double>& row_kernels<double>() {
  return TOKENPRUNE_CHOOSE(rows_f64);
}

}  // namespace tokenprune
