#include "cpu/simd/rows.h"

#include "cpu/simd/dot.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

template <class A>
void pack(const A* rows, int64_t row_stride, int64_t n, int64_t dim, A* panel) {
  pack_panel<A>(rows, row_stride, n, dim, panel);
}

template <class A>
void against_panel(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys, A* out) {
  panel_dots<A>(panel, dim, keys, key_stride, n_keys, out);
}

template <class A>
void between_panels(const A* rows, const A* others, int64_t dim, bool add, A* out, int64_t out_stride) {
  panel_products<A>(rows, others, dim, add, out, out_stride);
}

template <class A>
void distances(const A* panel, int64_t dim, const A* keys, int64_t key_stride, int64_t n_keys, A* out) {
  panel_dots<A, true>(panel, dim, keys, key_stride, n_keys, out);
}

template <class A>
void squares_of(const A* panel, int64_t dim, A* squares) {
  panel_squares<A>(panel, dim, squares);
}

template <class T, class A>
void normalize(const T* row, int64_t dim, A* unit) {
  widen(row, dim, unit);
  const A norm = norm_of_squares(dot(unit, unit, dim));
  for (int64_t d = 0; d < dim; ++d) unit[d] /= norm;
}

}  // namespace

extern const RowKernels<float> rows_f32;
extern const RowKernels<double> rows_f64;
const RowKernels<float> rows_f32 = {kPanelLanes<float>,
                                    kBlock,
                                    pack<float>,
                                    against_panel<float>,
                                    between_panels<float>,
                                    distances<float>,
                                    squares_of<float>,
                                    normalize<float, float>,
                                    normalize<Half, float>,
                                    normalize<BFloat16, float>};
const RowKernels<double> rows_f64 = {kPanelLanes<double>,
                                     kBlock,
                                     pack<double>,
                                     against_panel<double>,
                                     between_panels<double>,
                                     distances<double>,
                                     squares_of<double>,
                                     normalize<double, double>,
                                     nullptr,
                                     nullptr};

}  // namespace tokenprune::TOKENPRUNE_SIMD
