// max: lazy greedy. U(i) only gets worse as tokens are selected, so the U of a token over only the first few selected
// ones bounds its true U from below. A heap keeps the bounds; tokens at its top are brought up to date until an
// up-to-date one stays there. Most tokens are never compared with most of the selected ones.
#include <numeric>

#include "cpu/repulsion.h"

namespace tokenprune {

namespace {

template <class A>
struct Lazy {
  const Sample<A>& sample;
  std::vector<int64_t> selected;
  std::vector<const A*> selected_rows;
  std::vector<int64_t> seen;  // how many of the selected tokens this one is compared with
  std::vector<A> extreme;     // over those, see update_extreme
  std::vector<A> bound;       // U over those
  std::vector<int64_t> batch;
};

template <class A>
Lazy<A> start_lazy(const Sample<A>& s, std::vector<int64_t> selected) {
  std::vector<const A*> rows;
  for (const int64_t i : selected) rows.push_back(s.row(i));
  return {s,
          std::move(selected),
          std::move(rows),
          std::vector<int64_t>(s.n),
          std::vector<A>(s.n, initial_extreme(s)),
          std::vector<A>(s.n),
          {}};
}

// Applies the selected tokens in [their `seen`, last) to up to kMaxPairRows tokens, in portions, and stops early once
// every one of them is worse than `limit`.
template <class A>
void bring_up(Lazy<A>& lazy, const int64_t* tokens, int64_t count, int64_t last, const Rank<A>& limit) {
  constexpr int64_t kPortion = 12;
  const Sample<A>& s = lazy.sample;
  const auto pair_dots = repulsion_kernels<A>().pair_dots;
  const A* rows[kMaxPairRows];
  A dots[kMaxPairRows * kPortion];
  int64_t begin = last;
  for (int64_t r = 0; r < count; ++r) {
    rows[r] = s.row(tokens[r]);
    begin = std::min(begin, lazy.seen[tokens[r]]);
  }
  bool promising = true;
  while (begin < last && promising) {
    const int64_t end = std::min(begin + kPortion, last), width = end - begin;
    pair_dots(rows, count, lazy.selected_rows.data() + begin, width, padded(s.dim), dots);
    promising = false;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = tokens[r];
      for (int64_t t = 0; t < width; ++t) {
        const int64_t j = lazy.selected[begin + t];
        if (j != i) update_extreme(s, dots[r * width + t], i, j, lazy.extreme[i]);
      }
      lazy.seen[i] = std::max(lazy.seen[i], end);
      lazy.bound[i] = objective_of(s, i, lazy.extreme[i]);
      promising = promising || rank(lazy.bound[i], i) < limit;
    }
    begin = end;
  }
}

template <class A>
void bring_up_all(Lazy<A>& lazy, std::vector<int64_t>& tokens, int64_t last, const Rank<A>& limit) {
  in_groups(lazy.sample.team, tokens, lazy.seen, last, lazy.sample.dim,
            [&](const int64_t* group, int64_t count) { bring_up(lazy, group, count, last, limit); });
}

// Applies the first few selected ones to all `tokens`; then they wait in a heap, the best one on top.
template <class A>
std::vector<Rank<A>> first_round(Lazy<A>& lazy, std::vector<int64_t>& tokens) {
  constexpr int64_t kFirstPortion = 8;
  bring_up_all(lazy, tokens, std::min<int64_t>(lazy.selected.size(), kFirstPortion), worst_rank<A>());
  std::vector<Rank<A>> heap;
  heap.reserve(tokens.size());
  for (const int64_t i : tokens) heap.push_back(rank(lazy.bound[i], i));
  std::make_heap(heap.begin(), heap.end(), worse<Rank<A>>);
  return heap;
}

template <class A>
int64_t pop_best(Lazy<A>& lazy, std::vector<Rank<A>>& heap) {
  const int64_t last = lazy.selected.size();
  return pop_best(
      heap, lazy.batch, [&](int64_t i) { return lazy.seen[i] == last; },
      [&](std::vector<int64_t>& tokens, const Rank<A>& limit) { bring_up_all(lazy, tokens, last, limit); },
      [&](int64_t i) { return rank(lazy.bound[i], i); });
}

// The valid token whose largest cosine with another valid one is smallest, or -1: one lazy step in which all valid
// tokens count as selected. They are applied block by block, so that a block stays in cache, and in scattered order,
// so that a token is soon compared with one like itself; one that is worse than an up-to-date one drops out.
template <class A>
int64_t most_isolated(const Sample<A>& s, const std::vector<char>& available) {
  constexpr int64_t kBlock = 24, kSure = 8;
  Sample<A> plain = s;
  plain.potential = Potential::kCosine;
  plain.energy = nullptr;
  std::vector<int64_t> alive, sure;
  for (int64_t i = 0; i < s.n; ++i)
    if (available[i]) alive.push_back(i);
  const int64_t n = alive.size();
  if (n == 0) return -1;
  int64_t step = n * 5 / 8;
  while (std::gcd(step, n) != 1) ++step;
  std::vector<int64_t> scattered(n);
  for (int64_t t = 0; t < n; ++t) scattered[t] = alive[t * step % n];
  Lazy<A> lazy = start_lazy(plain, std::move(scattered));
  Rank<A> limit = worst_rank<A>();  // the best token that is up to date
  const auto by_bound = [&](int64_t a, int64_t b) { return rank(lazy.bound[a], a) < rank(lazy.bound[b], b); };
  int64_t refresh = kBlock;
  for (int64_t last = std::min(kBlock, n);; last = std::min(last + kBlock, n)) {
    bring_up_all(lazy, alive, last, limit);
    if (last >= refresh && last < n) {  // a few of the best go ahead, for a tighter limit
      refresh = 2 * last;
      sure = alive;
      const int64_t few = std::min<int64_t>(kSure, sure.size());
      std::partial_sort(sure.begin(), sure.begin() + few, sure.end(), by_bound);
      sure.resize(few);
      bring_up_all(lazy, sure, n, limit);
    }
    for (const int64_t i : sure)
      if (lazy.seen[i] == n) limit = std::min(limit, rank(lazy.bound[i], i));
    alive.erase(
        std::remove_if(alive.begin(), alive.end(),
                       [&](int64_t i) { return lazy.seen[i] == n ? last < n : limit < rank(lazy.bound[i], i); }),
        alive.end());
    if (last == n || alive.empty()) break;
  }
  for (const int64_t i : alive) limit = std::min(limit, rank(lazy.bound[i], i));
  return limit.index;
}

// cos(f_i, sum of the unit vectors of all valid tokens) for every token.
template <class A>
void outlier_objective(const Sample<A>& s, A* objective) {
  std::vector<A> total(s.stride), direction(s.stride);
  s.team.parallel_for(s.dim, std::max<int64_t>(64, kParallelWork / (s.n + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < s.n; ++i) {
      if (!s.valid(i)) continue;
      const A* row = s.row(i);
      for (int64_t d = begin; d < end; ++d) total[d] += row[d];
    }
  });
  row_kernels<A>().normalize(total.data(), s.dim, direction.data());
  const auto pair_dots = repulsion_kernels<A>().pair_dots;
  const A* other = direction.data();
  s.team.parallel_for(s.n, grain(s.dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* row = s.row(i);
      pair_dots(&row, 1, &other, 1, padded(s.dim), objective + i);
    }
  });
}

}  // namespace

template <class A>
int64_t first_pick(const Sample<A>& s, const std::vector<char>& available, A* objective) {
  if (s.energy != nullptr)
    std::copy(s.energy, s.energy + s.n, objective);
  else if (s.first == FirstPick::kOutlier)
    outlier_objective(s, objective);
  else
    std::fill(objective, objective + s.n, A(0));
  if (s.energy == nullptr && s.first == FirstPick::kIsolated) return most_isolated(s, available);
  return best_of(objective, available, s.n);
}

template <class A>
int64_t sample_max(const Sample<A>& s) {
  std::vector<char> available(s.n);
  Lazy<A> lazy = start_lazy(s, start_with_seeds(s, available));
  int64_t picked = 0;
  const auto select = [&](int64_t i) {
    s.out[picked++] = i;
    lazy.selected.push_back(i);
    lazy.selected_rows.push_back(s.row(i));
  };
  if (lazy.selected.empty()) {
    if (s.energy == nullptr && s.first == FirstPick::kIsolated && s.n <= kGramTokens) return sample_gram(s, available);
    const int64_t i = first_pick(s, available, lazy.bound.data());
    if (i < 0) return 0;
    select(i);
    available[i] = 0;
  }
  if (picked == s.k) return picked;
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < s.n; ++i)
    if (available[i]) tokens.push_back(i);
  std::vector<Rank<A>> heap = first_round(lazy, tokens);
  while (picked < s.k && !heap.empty()) select(pop_best(lazy, heap));
  return picked;
}

template int64_t first_pick(const Sample<float>&, const std::vector<char>&, float*);
template int64_t first_pick(const Sample<double>&, const std::vector<char>&, double*);
template int64_t sample_max(const Sample<float>&);
template int64_t sample_max(const Sample<double>&);

}  // namespace tokenprune
