// Chooses the table of density kernels for this machine.
#include "cpu/capability.h"
#include "cpu/simd/density.h"

namespace tokenprune {

TOKENPRUNE_TABLE(DensityKernels<float>, density_f32)
TOKENPRUNE_TABLE(DensityKernels<double>, density_f64)

template <>
const DensityKernels<float>& density_kernels<float>() {
  return TOKENPRUNE_CHOOSE(density_f32);
}
template <>
const DensityKernels<double>& density_kernels<double>() {
  return TOKENPRUNE_CHOOSE(density_f64);
}

}  // namespace tokenprune
