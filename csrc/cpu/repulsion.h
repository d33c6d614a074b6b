// The parts of repulsion_sample on the CPU: one sample, the order of its candidates, and the two strategies.
#pragma once

#include <algorithm>
#include <vector>

#include "args/repulsion.h"
#include "cpu/lazy.h"

namespace tokenprune {

constexpr int64_t kGramTokens = 3072;  // up to here sample_gram may store a cosine per pair of tokens

// One sample. Rows of `unit` are padded to a multiple of kRowMultiple.
template <class A>
struct Sample {
  Team& team;
  const A* unit;
  int64_t n, dim, stride;
  const A* positions;  // [n, axes] or null
  int64_t axes;
  const A* energy;      // or null
  const uint8_t* mask;  // bytes of a bool tensor, or null
  const int64_t* seeds;
  int64_t n_seeds;
  Potential potential;
  PotentialWeights<A> weights;
  FirstPick first;
  int64_t k;
  int64_t* out;

  const A* row(int64_t i) const { return unit + i * stride; }
  bool valid(int64_t i) const { return mask == nullptr || mask[i]; }
};

// By the smallest value.
template <class A>
Rank<A> rank(A value, int64_t i) {
  return {order_key(static_cast<A>(-value)), i};
}

template <class A>
A squared_distance(const Sample<A>& s, int64_t i, int64_t j) {
  A sum = 0;
  for (int64_t a = 0; a < s.axes; ++a) {
    const A difference = s.positions[i * s.axes + a] - s.positions[j * s.axes + a];
    sum += difference * difference;
  }
  return sum;
}

// For max: what a token keeps of the selected ones, the largest cosine or the smallest r2 (phi falls with r2): before
// any is selected, when j is selected too, and the U that follows.
template <class A>
A initial_extreme(const Sample<A>& s) {
  const A infinite = std::numeric_limits<A>::infinity();
  return s.potential == Potential::kCosine ? -infinite : infinite;
}

template <class A>
void update_extreme(const Sample<A>& s, A cosine, int64_t i, int64_t j, A& extreme) {
  if (s.potential == Potential::kCosine) {
    extreme = nan_max(extreme, cosine);
    return;
  }
  A r2 = s.weights.feature * 2 * (1 - cosine);
  if (s.positions != nullptr) r2 += s.weights.position * squared_distance(s, i, j);
  // exp(-inf / inf) is NaN although the smallest r2 may be finite.
  if (s.potential == Potential::kGaussian && r2 > std::numeric_limits<A>::max() && !(s.weights.two_sigma2 < r2))
    r2 = std::numeric_limits<A>::quiet_NaN();
  extreme = -nan_max(static_cast<A>(-extreme), static_cast<A>(-r2));
}

template <class A>
A objective_of(const Sample<A>& s, int64_t i, A extreme) {
  // With weights 0 and 1 the second term of r2 is `extreme` itself.
  const PotentialWeights<A> w{0, 1, s.weights.half_exponent, s.weights.epsilon, s.weights.two_sigma2};
  A value = extreme;
  if (s.potential == Potential::kRiesz) value = potential<Potential::kRiesz>(A(1), extreme, w);
  if (s.potential == Potential::kGaussian) value = potential<Potential::kGaussian>(A(1), extreme, w);
  return s.energy == nullptr ? value : value + s.energy[i];
}

// The best available token, or -1.
template <class A>
int64_t best_of(const A* value, const std::vector<char>& available, int64_t n) {
  Rank<A> best = worst_rank<A>();
  for (int64_t i = 0; i < n; ++i) {
    if (!available[i]) continue;
    const Rank<A> own = rank(value[i], i);
    if (own < best) best = own;
  }
  return best.key == kNoKey ? -1 : best.index;
}

// The seeds without repetitions, in ascending order; `available` loses them and the masked tokens.
template <class A>
std::vector<int64_t> start_with_seeds(const Sample<A>& s, std::vector<char>& available) {
  std::vector<int64_t> selected(s.seeds, s.seeds + s.n_seeds);
  std::sort(selected.begin(), selected.end());
  selected.erase(std::unique(selected.begin(), selected.end()), selected.end());
  if (!selected.empty() && selected.front() < 0) selected.erase(selected.begin());
  for (int64_t i = 0; i < s.n; ++i) available[i] = s.valid(i);
  for (const int64_t i : selected) available[i] = 0;
  return selected;
}

// The pick when nothing is selected yet, or -1. Leaves in `objective` what it minimised, or zeros if that never was
// computed for all tokens.
template <class A>
int64_t first_pick(const Sample<A>& s, const std::vector<char>& available, A* objective);

// They write the picks to s.out, in order, and return how many there are.
template <class A>
int64_t sample_max(const Sample<A>& s);
template <class A>
int64_t sample_sum(const Sample<A>& s);
// sample_max from the most isolated token, with all cosines in memory.
template <class A>
int64_t sample_gram(const Sample<A>& s, std::vector<char>& available);

}  // namespace tokenprune
