// CPU kernel of paired_cosine: one pass over both lists, as fast as memory gives them.

#include <cmath>

#include "cpu/simd/rows.h"
#include "cpu/simd/similarity.h"
#include "dispatch.h"
#include "op.h"
#include "parallel.h"
#include "tokenprune/math.h"

namespace tokenprune {

namespace {

// cos(a, b) of two rows. Where squares overflow, rows are normalised before the product, as the contract has it.
template <class T, class A>
A cosine(const T* a, const T* b, int64_t dim, A* unit) {
  const auto& kernels = similarity_kernels<T>();
  A sums[3];
  kernels.pair_sums(a, b, dim, sums);
  const A of_a = norm_from_squares(sums[1]), of_b = norm_from_squares(sums[2]);
  if (std::isfinite(of_a) && std::isfinite(of_b)) return sums[0] / of_a / of_b;
  normalize_row(row_kernels<A>(), a, dim, unit);
  normalize_row(row_kernels<A>(), b, dim, unit + dim);
  similarity_kernels<A>().pair_sums(unit, unit + dim, dim, sums);
  return sums[0];
}

Tensor paired_cosine(const Tensor& a_in, const Tensor& b_in) {
  check_paired_cosine(a_in, b_in);
  const Tensor a = with_contiguous_rows(a_in), b = with_contiguous_rows(b_in);
  const int64_t batch = a.size(0), n = a.size(1), dim = a.size(2);
  Tensor scores = new_empty(a, {batch, n}, wide_type(a));
  dispatch_floating(a.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const T* const of_a = static_cast<const T*>(a.const_data_ptr());
    const T* const of_b = static_cast<const T*>(b.const_data_ptr());
    A* const out = static_cast<A*>(scores.mutable_data_ptr());
    parallel_for(batch * n, 1 + 32768 / (dim + 1), [&](int64_t begin, int64_t end) {
      std::vector<A> unit(2 * dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t s = item / n, i = item % n;
        out[item] = cosine(of_a + s * a.stride(0) + i * a.stride(1), of_b + s * b.stride(0) + i * b.stride(1), dim,
                           unit.data());
      }
    });
  });
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "paired_cosine", paired_cosine); }

}  // namespace tokenprune
