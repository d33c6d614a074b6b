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
    typename VectorOfBytes<A, bytes / 2>::type low, high;
    std::memcpy(&low, &v, bytes / 2);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + bytes / 2, bytes / 2);
    return largest_lane<A, bytes / 2>(low > high ? low : high);
  }
}

template <class A>
void best_lanes(const A* values, int64_t n, A sign, int64_t first_slot, A* best, int64_t* at) {
  constexpr int width = kWidth<A>;
  for (int64_t r = 0; r < n; ++r, values += kPanelLanes<A>) {
    const Vec<A> first = sign * load(values), second = sign * load(values + width);
    Vec<A> most = splat(best[r]);
    most = first > most ? first : most;
    most = second > most ? second : most;
    const A top = largest_lane<A>(most);
    if (!(top > best[r]) && at[r] >= 0) continue;
    for (int l = 0; l < kPanelLanes<A>; ++l) {
      if (sign * values[l] != top) continue;
      best[r] = top;
      at[r] = first_slot + l;
      break;
    }
  }
}

template <class T>
void accumulate(const T* row, int64_t n, Wide<T> weight, Wide<T>* sum) {
  constexpr int width = kWidth<Wide<T>>;
  int64_t d = 0;
  for (; d + width <= n; d += width) store(sum + d, load(sum + d) + weight * load_wide(row + d));
  for (; d < n; ++d) sum[d] += weight * to_float(row[d]);
}

template <class T>
void divide(const Wide<T>* sum, int64_t n, Wide<T> size, T* mean) {
  for (int64_t d = 0; d < n; ++d) mean[d] = rounded_to<T>(sum[d] / size);
}

template <class T>
constexpr MergingKernels<T, Wide<T>> kKernels = {best_lanes<Wide<T>>, accumulate<T>, divide<T>};

}  // namespace

extern const MergingTable merging;
const MergingTable merging = {kKernels<float>, kKernels<double>, kKernels<Half>, kKernels<BFloat16>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
