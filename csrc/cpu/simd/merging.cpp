#include "cpu/simd/merging.h"

#include "cpu/simd/dot.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

// The largest of the numbers in a vector without NaN.
template <class A, int bytes = kVectorBytes>
TOKENPRUNE_INLINE A largest_lane(typename VectorOfBytes<A, bytes>::type v) {
  if constexpr (bytes == 2 * sizeof(A)) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    const auto low = half_of<A, bytes, false>(v), high = half_of<A, bytes, true>(v);
    return largest_lane<A, bytes / 2>(low > high ? low : high);
  }
}

// Without branches: whether the next panel has a better target is as good as random.
template <class A>
void best_lanes(const A* values, int64_t n, A sign, int64_t first_slot, A* best, int64_t* at) {
  using Lane = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  constexpr int width = kWidth<A>, lanes = kPanelLanes<A>;
  Vec<Lane> from_end;  // the first lane has the largest number, and no lane 0
  for (int l = 0; l < width; ++l) from_end[l] = lanes - l;
  for (int64_t r = 0; r < n; ++r, values += lanes) {
    const Vec<A> first = sign * load(values), second = sign * load(values + width);
    Vec<A> most = splat(best[r]);
    most = first > most ? first : most;
    most = second > most ? second : most;
    const A top = largest_lane<A>(most);
    const Vec<Lane> in_first = first == top ? from_end : Vec<Lane>{};
    const Vec<Lane> in_second = second == top ? from_end - width : Vec<Lane>{};
    const Lane found = largest_lane<Lane>(in_first > in_second ? in_first : in_second);
    const bool better = (found > 0) & ((top > best[r]) | (at[r] < 0));
    best[r] = better ? top : best[r];
    at[r] = better ? first_slot + lanes - found : at[r];
  }
}

// The means of `vecs` vectors of columns: sums stay in registers while the tokens pass.
template <class T, int vecs, class A = Wide<T>>
TOKENPRUNE_INLINE void mean_of_columns(const T* columns, int64_t row_stride, const int64_t* tokens, int64_t count,
                                       const A* weights, A size, T* mean) {
  constexpr int width = kWidth<A>;
  Vec<A> sum[vecs] = {};
  for (int64_t m = 0; m < count; ++m) {
    const T* const row = columns + tokens[m] * row_stride;
    const A weight = weights == nullptr ? A(1) : weights[tokens[m]];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) sum[v] += weight * load_wide(row + v * width);
  }
  for (int v = 0; v < vecs; ++v) {
    const Vec<A> quotient = sum[v] / size;
    for (int l = 0; l < width; ++l) mean[v * width + l] = rounded_to<T>(quotient[l]);
  }
}

template <class T, class A = Wide<T>>
void mean_of(const T* columns, int64_t row_stride, const int64_t* tokens, int64_t count, const A* weights, A size,
             int64_t n, T* mean) {
  constexpr int width = kWidth<A>;
  int64_t d = 0;
  for (; d + 4 * width <= n; d += 4 * width)
    mean_of_columns<T, 4>(columns + d, row_stride, tokens, count, weights, size, mean + d);
  for (; d + width <= n; d += width)
    mean_of_columns<T, 1>(columns + d, row_stride, tokens, count, weights, size, mean + d);
  for (; d < n; ++d) {
    A sum = 0;
    for (int64_t m = 0; m < count; ++m)
      sum += (weights == nullptr ? A(1) : weights[tokens[m]]) * to_float(columns[tokens[m] * row_stride + d]);
    mean[d] = rounded_to<T>(sum / size);
  }
}

template <class T>
constexpr MergingKernels<T, Wide<T>> kKernels = {best_lanes<Wide<T>>, mean_of<T>};

}  // namespace

extern const MergingTable merging;
const MergingTable merging = {kKernels<float>, kKernels<double>, kKernels<Half>, kKernels<BFloat16>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
