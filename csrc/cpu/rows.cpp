// Chooses the table of row kernels for this machine.
#include "cpu/simd/rows.h"
#include "cpu/capability.h"

namespace tokenprune {

namespace baseline {
extern const RowKernels<float> rows_f32;
extern const RowKernels<double> rows_f64;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernels<float> rows_f32;
extern const RowKernels<double> rows_f64;
}  // namespace avx2
namespace avx512 {
extern const RowKernels<float> rows_f32;
extern const RowKernels<double> rows_f64;
}  // namespace avx512
#define TOKENPRUNE_CHOOSE(table) choose(baseline::table, &avx2::table, &avx512::table)
#else
#define TOKENPRUNE_CHOOSE(table) baseline::table
#endif

template <>
const RowKernels<float>& row_kernels<float>() {
  return TOKENPRUNE_CHOOSE(rows_f32);
}
template <>
const RowKernels<double>& row_kernels<double>() {
  return TOKENPRUNE_CHOOSE(rows_f64);
}

}  // namespace tokenprune
