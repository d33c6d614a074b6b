#include "cpu/simd/similarity.h"

#include "cpu/simd/vec.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

// The last n elements of a row, zero beyond them.
template <class T>
TOKENPRUNE_INLINE Vec<Wide<T>> load_rest(const T* p, int64_t n) {
  Wide<T> lanes[kWidth<Wide<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <class T>
Wide<T> dot(const T* a, const T* b, int64_t dim) {
  using A = Wide<T>;
  constexpr int width = kWidth<A>;
  Vec<A> sum[4] = {};
  int64_t d = 0;
  for (; d + 4 * width <= dim; d += 4 * width)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) sum[u] += load_wide(a + d + u * width) * load_wide(b + d + u * width);
  for (; d + width <= dim; d += width) sum[0] += load_wide(a + d) * load_wide(b + d);
  if (d < dim) sum[0] += load_rest(a + d, dim - d) * load_rest(b + d, dim - d);
  return horizontal_sum<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Three vectors of each sum: nine chains of multiply-adds hide their latency, more would leave AVX2 without registers.
template <class T>
void pair_sums(const T* a, const T* b, int64_t dim, Wide<T>* sums) {
  using A = Wide<T>;
  constexpr int width = kWidth<A>, chains = 3;
  Vec<A> sum[3][chains] = {};
  const auto add = [&](int u, Vec<A> x, Vec<A> y) __attribute__((always_inline)) {
    sum[0][u] += x * y;
    sum[1][u] += x * x;
    sum[2][u] += y * y;
  };
  int64_t d = 0;
  for (; d + chains * width <= dim; d += chains * width)
#pragma GCC unroll 3
    for (int u = 0; u < chains; ++u) add(u, load_wide(a + d + u * width), load_wide(b + d + u * width));
  for (; d + width <= dim; d += width) add(0, load_wide(a + d), load_wide(b + d));
  if (d < dim) add(0, load_rest(a + d, dim - d), load_rest(b + d, dim - d));
#pragma GCC unroll 3
  for (int q = 0; q < 3; ++q) sums[q] = horizontal_sum<A>(sum[q][0] + (sum[q][1] + sum[q][2]));
}

// Every sum runs in `chains` interleaved vectors: together there are enough of them to hide the latency of the
// multiply-add, and with two rows few enough loads of the unit rows to keep it busy.
template <class T, int count, bool squared>
void few(const T* const* rows, int64_t dim, const Wide<T>* units, int64_t unit_stride, Wide<T>* dots,
         Wide<T>* squares) {
  using A = Wide<T>;
  constexpr int width = kWidth<A>, chains = count <= 1 ? 2 : 1, sums = count + squared;
  const T* const row[2] = {rows[0], rows[1]};
  Vec<A> sum[2][sums][chains] = {};
  const auto add = [&](int u, const Vec<A>(&x)[2], const auto& unit) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int q = 0; q < count; ++q) {
      const Vec<A> y = unit(q);
      sum[0][q][u] += x[0] * y;
      sum[1][q][u] += x[1] * y;
    }
    if constexpr (squared) {
      sum[0][count][u] += x[0] * x[0];
      sum[1][count][u] += x[1] * x[1];
    }
  };
  int64_t d = 0;
  for (; d + chains * width <= dim; d += chains * width)
#pragma GCC unroll 2
    for (int u = 0; u < chains; ++u) {
      const int64_t at = d + u * width;
      const Vec<A> x[2] = {load_wide(row[0] + at), load_wide(row[1] + at)};
      add(u, x, [&](int q) __attribute__((always_inline)) { return load(units + q * unit_stride + at); });
    }
  for (; d < dim; d += width) {
    const int64_t rest = dim - d < width ? dim - d : width;
    const Vec<A> x[2] = {load_rest(row[0] + d, rest), load_rest(row[1] + d, rest)};
    add(0, x, [&](int q) __attribute__((always_inline)) { return load_rest(units + q * unit_stride + d, rest); });
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r)
#pragma GCC unroll 5
    for (int q = 0; q < sums; ++q) {
      Vec<A> total = sum[r][q][0];
      if constexpr (chains == 2) total += sum[r][q][1];
      (q < count ? dots[r * kFew + q] : squares[r]) = horizontal_sum<A>(total);
    }
}

template <class T>
void few_dots(const T* const* rows, int64_t dim, const Wide<T>* units, int64_t unit_stride, int count, Wide<T>* dots,
              Wide<T>* squares) {
  using Kernel = void (*)(const T* const*, int64_t, const Wide<T>*, int64_t, Wide<T>*, Wide<T>*);
  static constexpr Kernel with[] = {few<T, 0, true>, few<T, 1, true>, few<T, 2, true>, few<T, 3, true>,
                                    few<T, 4, true>};
  static constexpr Kernel without[] = {nullptr, few<T, 1, false>, few<T, 2, false>, few<T, 3, false>, few<T, 4, false>};
  const Kernel kernel = squares != nullptr ? with[count] : without[count];
  if (kernel != nullptr) kernel(rows, dim, units, unit_stride, dots, squares);
}

template <class T>
void add_scaled(const T* row, int64_t dim, double scale, double* sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += scale * double(to_float(row[d]));
}

template <class T>
void widen_row(const T* row, int64_t dim, Wide<T>* wide) {
  constexpr int width = kWidth<Wide<T>>;
  int64_t d = 0;
  for (; d + width <= dim; d += width) store(wide + d, load_wide(row + d));
  for (; d < dim; ++d) wide[d] = to_float(row[d]);
}

template <class A>
void max_into(const A* x, int64_t n, A* into) {
  constexpr int width = kWidth<A>;
  int64_t i = 0;
  for (; i + width <= n; i += width) store(into + i, vec_max<A>(load(into + i), load(x + i)));
  for (; i < n; ++i) into[i] = (into[i] > x[i] || into[i] != into[i]) ? into[i] : x[i];
}

template <class T>
constexpr SimilarityKernels<T, Wide<T>> kKernels = {dot<T>,        pair_sums<T>, few_dots<T>,
                                                    add_scaled<T>, widen_row<T>, max_into<Wide<T>>};

}  // namespace

extern const SimilarityTable similarity;
const SimilarityTable similarity = {kKernels<float>, kKernels<double>, kKernels<Half>, kKernels<BFloat16>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
