#include "cpu/simd/density.h"

#include "cpu/simd/vec.h"

namespace tokenprune::TOKENPRUNE_SIMD {

namespace {

template <class A>
constexpr A kInfinity = A(__builtin_inf());

// Is any lane of a comparison's result set?
template <class Mask>
TOKENPRUNE_INLINE bool any_lane(Mask mask) {
  uint64_t words[sizeof(Mask) / 8], any = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) any |= word;
  return any != 0;
}

template <class A>
int64_t next_below(const A* row, int64_t begin, int64_t n, A limit) {
  constexpr int width = kWidth<A>;
  int64_t j = begin;
  while (j + 2 * width <= n && !any_lane((load(row + j) < limit) | (load(row + j + width) < limit))) j += 2 * width;
  while (j < n && !(row[j] < limit)) ++j;
  return j;
}

template <class A>
A largest(const A* row, int64_t n) {
  constexpr int width = kWidth<A>;
  Vec<A> most = {};
  int64_t j = 0;
  for (; j + width <= n; j += width) most = load(row + j) > most ? load(row + j) : most;
  A result = 0;
  for (int l = 0; l < width; ++l) result = most[l] > result ? most[l] : result;
  for (; j < n; ++j) result = row[j] > result ? row[j] : result;
  return result;
}

// The smallest number of row[begin, end) whose mean is below `limit`, or equal to it with `or_equal`. Infinity is a
// number, and is told from nothing at all by `found`.
template <bool or_equal, class A>
TOKENPRUNE_INLINE A smallest(const A* row, const A* mean, int64_t begin, int64_t end, A limit, bool& found) {
  constexpr int width = kWidth<A>;
  const Vec<A> infinite = splat(kInfinity<A>);
  Vec<A> least = infinite;
  auto counted = least != least;  // false in every lane
  int64_t j = begin;
  for (; j + width <= end; j += width) {
    const Vec<A> x = load(row + j), m = load(mean + j);
    const auto counts = (or_equal ? m <= limit : m < limit) & (x == x);
    least = (counts & (x < least)) ? x : least;
    counted |= counts;
  }
  found = found || any_lane(counted);
  A result = kInfinity<A>;
  for (int l = 0; l < width; ++l) result = least[l] < result ? least[l] : result;
  for (; j < end; ++j) {
    if (!((or_equal ? mean[j] <= limit : mean[j] < limit) && row[j] == row[j])) continue;
    found = true;
    result = row[j] < result ? row[j] : result;
  }
  return result;
}

template <class A>
A nearest_denser(const A* row, const A* mean, int64_t n, int64_t earlier, A own) {
  bool found = false;
  const A before = smallest<true>(row, mean, 0, earlier, own, found);
  const A after = smallest<false>(row, mean, earlier, n, own, found);
  return found ? (after < before ? after : before) : A(__builtin_nan(""));
}

}  // namespace

extern const DensityKernels<float> density_f32;
extern const DensityKernels<double> density_f64;
const DensityKernels<float> density_f32 = {next_below<float>, largest<float>, nearest_denser<float>};
const DensityKernels<double> density_f64 = {next_below<double>, largest<double>, nearest_denser<double>};

}  // namespace tokenprune::TOKENPRUNE_SIMD
