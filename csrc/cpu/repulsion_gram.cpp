// max from the most isolated token: that start compares all pairs anyway, so for a moderate number of tokens their
// cosines are computed once, each pair once, and every later step reads them.
#include <memory>

#include "cpu/repulsion.h"

namespace tokenprune {

namespace {

// gram[j * n + i] for i <= j.
template <class A>
void fill_triangle(const Sample<A>& s, A* gram) {
  constexpr int64_t kKeys = 96;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, panels = (s.n + lanes - 1) / lanes;
  const auto panel_against_the_rest = [&](int64_t first, A* panel, A* dots) {
    const int64_t width = std::min(lanes, s.n - first);
    kernels.pack_panel(s.row(first), s.stride, width, s.dim, panel);
    for (int64_t j = first; j < s.n; j += kKeys) {
      const int64_t count = std::min(kKeys, s.n - j);
      kernels.panel_dots(panel, s.dim, s.row(j), s.stride, count, dots);
      for (int64_t r = 0; r < count; ++r) std::copy_n(dots + r * lanes, width, gram + (j + r) * s.n + first);
    }
  };
  // The later a panel, the fewer tokens come after it: an early and a late one together are always the same work.
  const int64_t work = s.n * lanes * (s.dim + 1);
  s.team.parallel_for((panels + 1) / 2, std::max<int64_t>(1, kParallelWork / work), [&](int64_t begin, int64_t end) {
    std::vector<A> panel(s.dim * lanes), dots(kKeys * lanes);
    for (int64_t early = begin; early < end; ++early) {
      const int64_t late = panels - 1 - early;
      panel_against_the_rest(early * lanes, panel.data(), dots.data());
      if (late != early) panel_against_the_rest(late * lanes, panel.data(), dots.data());
    }
  });
}

// The largest cosine of every valid token with another valid one.
template <class A>
std::vector<A> nearest(const Sample<A>& s, const A* gram) {
  std::vector<A> largest(s.n, -std::numeric_limits<A>::infinity());
  for (int64_t j = 0; j < s.n; ++j) {
    if (!s.valid(j)) continue;
    for (int64_t i = 0; i < j; ++i) {
      if (!s.valid(i)) continue;
      const A cosine = gram[j * s.n + i];
      largest[i] = nan_max(largest[i], cosine);
      largest[j] = nan_max(largest[j], cosine);
    }
  }
  return largest;
}

}  // namespace

template <class A>
int64_t sample_gram(const Sample<A>& s, std::vector<char>& available) {
  const std::unique_ptr<A[]> gram(new A[s.n * s.n]);
  fill_triangle(s, gram.get());
  std::vector<A> objective = nearest(s, gram.get()), extreme(s.n, initial_extreme(s));
  for (int64_t picked = 0; picked < s.k; ++picked) {
    const int64_t j = best_of(objective.data(), available, s.n);
    if (j < 0) return picked;
    s.out[picked] = j;
    available[j] = 0;
    for (int64_t i = 0; i < s.n; ++i) {
      if (!available[i]) continue;
      update_extreme(s, i < j ? gram[j * s.n + i] : gram[i * s.n + j], i, j, extreme[i]);
      objective[i] = objective_of(s, i, extreme[i]);
    }
  }
  return s.k;
}

template int64_t sample_gram(const Sample<float>&, std::vector<char>&);
template int64_t sample_gram(const Sample<double>&, std::vector<char>&);

}  // namespace tokenprune
