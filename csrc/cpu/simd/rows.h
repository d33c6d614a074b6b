// The vectorised row kernels as a table of functions, one table per capability; `row_kernels<A>()` gives the best one.
#pragma once

#include <cstdint>

#include "cpu/half.h"

namespace tokenprune {

template <class A>
struct RowKernels {
  int panel_lanes;      // rows in one panel
  int64_t panel_block;  // dimensions whose products are summed before they are added to the sums of those before
  // Transposes up to panel_lanes rows into a panel of dim * panel_lanes elements; missing rows are zero.
  void (*pack_panel)(const A* rows, int64_t row_stride, int64_t n, int64_t dim, A* panel);
  // out[key * panel_lanes + lane] = <keys[key], panel row lane>.
  void (*panel_dots)(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys, A* out);
  // The same of all rows of a panel instead of keys, rows of out_stride, over one panel_block at most; with `add`, on top
  // of what `out` holds.
  void (*panel_products)(const A* rows, const A* others, int64_t dim, bool add, A* out, int64_t out_stride);
  // out[key * panel_lanes + lane] = ||keys[key] - panel row lane||^2, from differences.
  void (*panel_distances)(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys, A* out);
  // squares[lane] = <panel row lane, itself>, to the bit what panel_dots gives of two such rows.
  void (*panel_squares)(const A* panel, int64_t dim, A* squares);
  // The row in the arithmetic type, divided by max(||row||, kNormFloor).
  void (*normalize)(const A* row, int64_t dim, A* unit);
  void (*normalize_half)(const Half* row, int64_t dim, A* unit);          // float only
  void (*normalize_bfloat16)(const BFloat16* row, int64_t dim, A* unit);  // float only
};

template <class A>
const RowKernels<A>& row_kernels();

// One name for the three normalisations.
template <class A>
void normalize_row(const RowKernels<A>& kernels, const A* row, int64_t dim, A* unit) {
  kernels.normalize(row, dim, unit);
}
inline void normalize_row(const RowKernels<float>& kernels, const Half* row, int64_t dim, float* unit) {
  kernels.normalize_half(row, dim, unit);
}
inline void normalize_row(const RowKernels<float>& kernels, const BFloat16* row, int64_t dim, float* unit) {
  kernels.normalize_bfloat16(row, dim, unit);
}

}  // namespace tokenprune
