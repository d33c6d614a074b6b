// CPU kernels of repulsion_sample. Two exact strategies, neither of which forms the N x N matrix:
//
// max: lazy greedy. U(i) only gets worse as tokens are selected, so the U of a token that has met only the first few
//   selected ones bounds its true U from below. A heap keeps the bounds; tokens at its top are brought up to date until
//   an up-to-date one stays there. Most tokens never meet most of the selected ones.
// sum: speculation. Every token needs every selected token's row, but rows can be computed early: the rows of the best
//   candidates of the moment come from one matrix product, and as long as the next picks are among them, a step is one
//   pass over N numbers.
//
// All products that enter U come from one kernel per strategy, whose bits do not depend on the batch or the thread, so
// that identical tokens get identical U and tie as the contract says.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "args/repulsion.h"
#include "cpu/capability.h"
#include "cpu/simd/repulsion.h"
#include "cpu/simd/rows.h"
#include "dispatch.h"
#include "parallel.h"
#include "tokenprune/order.h"

namespace tokenprune {

namespace baseline {
extern const RepulsionKernels<float> repulsion_f32;
extern const RepulsionKernels<double> repulsion_f64;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
extern const RepulsionKernels<float> repulsion_f32;
extern const RepulsionKernels<double> repulsion_f64;
}  // namespace avx2
namespace avx512 {
extern const RepulsionKernels<float> repulsion_f32;
extern const RepulsionKernels<double> repulsion_f64;
}  // namespace avx512
#define TOKENPRUNE_CHOOSE(table) choose(baseline::table, &avx2::table, &avx512::table)
#else
#define TOKENPRUNE_CHOOSE(table) baseline::table
#endif

template <>
const RepulsionKernels<float>& repulsion_kernels<float>() {
  return TOKENPRUNE_CHOOSE(repulsion_f32);
}
template <>
const RepulsionKernels<double>& repulsion_kernels<double>() {
  return TOKENPRUNE_CHOOSE(repulsion_f64);
}

namespace {

constexpr int64_t kChunk = 64;              // tokens per block of a matrix product
constexpr int64_t kParallelWork = 1 << 17;  // multiply-adds that are worth a second thread

int64_t padded(int64_t n) { return (n + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

// Tokens per piece when one token costs `work` multiply-adds.
int64_t grain(int64_t work) { return std::max<int64_t>(kMaxPairRows, kParallelWork / (work + 1)); }

// One sample. Rows of `unit` are padded to a multiple of kRowMultiple.
template <class A>
struct Sample {
  const A* unit;
  int64_t n, dim, stride;
  const A* positions;  // [n, axes] or null
  int64_t axes;
  const A* energy;   // or null
  const bool* mask;  // or null
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

template <class A>
using Key = decltype(order_key(A()));
// Sorts as the candidate order for the smallest value does: the lesser rank is the better candidate.
template <class A>
using Rank = std::pair<Key<A>, int64_t>;

template <class A>
Rank<A> rank(A value, int64_t i) {
  return {static_cast<Key<A>>(~order_key(static_cast<A>(-value))), i};
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

// ---- The first pick ----

// cos(f_i, sum of the unit vectors of all valid tokens) for every token.
template <class A>
void outlier_objective(const Sample<A>& s, A* objective) {
  std::vector<A> total(s.stride), direction(s.stride);
  parallel_for(s.dim, std::max<int64_t>(64, kParallelWork / (s.n + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < s.n; ++i) {
      if (!s.valid(i)) continue;
      const A* row = s.row(i);
      for (int64_t d = begin; d < end; ++d) total[d] += row[d];
    }
  });
  row_kernels<A>().normalize(total.data(), s.dim, direction.data());
  const auto pair_dots = repulsion_kernels<A>().pair_dots;
  const A* other = direction.data();
  parallel_for(s.n, grain(s.dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* row = s.row(i);
      pair_dots(&row, 1, &other, 1, padded(s.dim), objective + i);
    }
  });
}

// Largest cosine with another valid token, for every token; -inf where there is none.
template <class A>
void isolated_objective(const Sample<A>& s, A* objective) {
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = padded(s.dim);
  const int64_t threads = s.n * s.n * s.dim >= 4 * kParallelWork ? 16 : 1;
  const int64_t piece = std::max((s.n + threads - 1) / threads, kChunk);
  std::fill(objective, objective + s.n, -std::numeric_limits<A>::infinity());
  parallel_for(s.n, piece, [&](int64_t begin, int64_t end) {
    std::vector<A> panel(lanes * dim), dots(kChunk * lanes);
    for (int64_t start = 0; start < s.n; start += lanes) {
      const int64_t width = std::min(lanes, s.n - start);
      kernels.pack_panel(s.row(start), s.stride, width, dim, panel.data());
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t rows = std::min(kChunk, end - i);
        kernels.panel_dots(panel.data(), dim, s.row(i), s.stride, rows, dots.data());
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t l = 0; l < width; ++l)
            if (start + l != i + r && s.valid(start + l))
              objective[i + r] = nan_max(objective[i + r], dots[r * lanes + l]);
      }
    }
  });
}

// What the very first pick minimises when nothing is selected yet.
template <class A>
void first_objective(const Sample<A>& s, A* objective) {
  if (s.energy != nullptr)
    std::copy(s.energy, s.energy + s.n, objective);
  else if (s.first == FirstPick::kOutlier)
    outlier_objective(s, objective);
  else if (s.first == FirstPick::kIsolated)
    isolated_objective(s, objective);
  else
    std::fill(objective, objective + s.n, A(0));
}

// The best available token, or -1.
template <class A>
int64_t best_of(const A* value, const std::vector<char>& available, int64_t n) {
  int64_t best = -1;
  Rank<A> lowest{};
  for (int64_t i = 0; i < n; ++i) {
    if (!available[i]) continue;
    const Rank<A> r = rank(value[i], i);
    if (best < 0 || r < lowest) {
      best = i;
      lowest = r;
    }
  }
  return best;
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

// ---- aggregate = max: lazy greedy ----

template <class A>
struct Lazy {
  const Sample<A>& sample;
  std::vector<int64_t> selected;
  std::vector<const A*> selected_rows;
  std::vector<int64_t> seen;  // how many of the selected tokens this one has met
  std::vector<A> extreme;     // over those: the largest cosine, or the smallest r2 (phi falls with r2)
  std::vector<A> bound;       // U over those
};

template <class A>
void meet(const Sample<A>& s, A cosine, int64_t i, int64_t j, A& extreme) {
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

// Let up to kMaxPairRows tokens meet the selected ones in [their `seen`, last), in portions, and stop early once every
// one of them is worse than `limit`.
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
      for (int64_t t = 0; t < width; ++t) meet(s, dots[r * width + t], i, lazy.selected[begin + t], lazy.extreme[i]);
      lazy.seen[i] = std::max(lazy.seen[i], end);
      lazy.bound[i] = objective_of(s, i, lazy.extreme[i]);
      promising = promising || rank(lazy.bound[i], i) < limit;
    }
    begin = end;
  }
}

// All of `tokens`, in groups of similar staleness, on several threads when that pays.
template <class A>
void bring_up_all(Lazy<A>& lazy, std::vector<int64_t>& tokens, int64_t last, const Rank<A>& limit) {
  constexpr int64_t kSpread = 4;
  std::sort(tokens.begin(), tokens.end(),
            [&](int64_t a, int64_t b) { return lazy.seen[a] != lazy.seen[b] ? lazy.seen[a] < lazy.seen[b] : a < b; });
  const int64_t count = tokens.size(), pieces = (count + kMaxPairRows - 1) / kMaxPairRows;
  int64_t work = 0;
  for (const int64_t i : tokens) work += std::min<int64_t>(last - lazy.seen[i], 12) * lazy.sample.dim;
  parallel_for(pieces, work >= 2 * kParallelWork ? 1 : pieces, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * kMaxPairRows, count);
    for (int64_t at = begin * kMaxPairRows; at < stop;) {
      int64_t next = at + 1;
      while (next < stop && next < at + kMaxPairRows && lazy.seen[tokens[next]] <= lazy.seen[tokens[at]] + kSpread)
        ++next;
      bring_up(lazy, tokens.data() + at, next - at, last, limit);
      at = next;
    }
  });
}

template <class A>
int64_t sample_max(const Sample<A>& s) {
  constexpr int64_t kFirstPortion = 8, kSmallBatch = 4, kLargeBatch = 64;
  std::vector<char> available(s.n);
  Lazy<A> lazy{s, start_with_seeds(s, available), {}, std::vector<int64_t>(s.n), {}, std::vector<A>(s.n)};
  lazy.extreme.assign(s.n, s.potential == Potential::kCosine ? -std::numeric_limits<A>::infinity()
                                                             : std::numeric_limits<A>::infinity());
  for (const int64_t i : lazy.selected) lazy.selected_rows.push_back(s.row(i));
  int64_t picked = 0;
  const auto select = [&](int64_t i) {
    s.out[picked++] = i;
    available[i] = 0;
    lazy.selected.push_back(i);
    lazy.selected_rows.push_back(s.row(i));
  };
  if (lazy.selected.empty()) {
    first_objective(s, lazy.bound.data());
    const int64_t i = best_of(lazy.bound.data(), available, s.n);
    if (i < 0) return 0;
    select(i);
  }
  if (picked == s.k) return picked;

  const Rank<A> none{std::numeric_limits<Key<A>>::max(), std::numeric_limits<int64_t>::max()};
  std::vector<int64_t> batch;
  for (int64_t i = 0; i < s.n; ++i)
    if (available[i]) batch.push_back(i);
  const int64_t portion = std::min<int64_t>(lazy.selected.size(), kFirstPortion);
  bring_up_all(lazy, batch, portion, none);
  std::vector<Rank<A>> heap;
  for (const int64_t i : batch) heap.push_back(rank(lazy.bound[i], i));
  const auto worse = [](const Rank<A>& a, const Rank<A>& b) { return b < a; };  // the best one on top
  std::make_heap(heap.begin(), heap.end(), worse);

  while (picked < s.k && !heap.empty()) {
    const int64_t last = lazy.selected.size();
    int64_t size = kSmallBatch;
    Rank<A> limit = none;  // the best up-to-date candidate of this step
    while (lazy.seen[heap.front().second] < last) {
      batch.clear();
      while (!heap.empty() && static_cast<int64_t>(batch.size()) < size && heap.front() < limit) {
        const int64_t i = heap.front().second;
        if (lazy.seen[i] == last) {
          limit = heap.front();
          break;
        }
        batch.push_back(i);
        std::pop_heap(heap.begin(), heap.end(), worse);
        heap.pop_back();
      }
      bring_up_all(lazy, batch, last, limit);
      for (const int64_t i : batch) {
        heap.push_back(rank(lazy.bound[i], i));
        if (lazy.seen[i] == last) limit = std::min(limit, heap.back());
        std::push_heap(heap.begin(), heap.end(), worse);
      }
      size = std::min(2 * size, kLargeBatch);
    }
    select(heap.front().second);
    std::pop_heap(heap.begin(), heap.end(), worse);
    heap.pop_back();
  }
  return picked;
}

// ---- aggregate = sum: speculation ----

template <class A>
struct Rows {
  const Sample<A>& sample;
  int64_t length;         // n, padded
  std::vector<A> places;  // the positions by axis, [axes][length]
  std::vector<A> panel;
  std::vector<A> potentials;      // [capacity][length]
  std::vector<int64_t> token_of;  // slot -> token, or -1
  std::vector<int64_t> slot_of;   // token -> slot, or -1
};

// phi of `count` tokens with every token, into the slots from `slot` on.
template <class A>
void compute_rows(Rows<A>& rows, const int64_t* tokens, int64_t count, int64_t slot) {
  const Sample<A>& s = rows.sample;
  const RowKernels<A>& kernels = row_kernels<A>();
  const RepulsionKernels<A>& own = repulsion_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = padded(s.dim), chunks = (s.n + kChunk - 1) / kChunk;
  for (int64_t l = 0; l < count; ++l) {
    const A* row = s.row(tokens[l]);
    for (int64_t d = 0; d < dim; ++d) rows.panel[d * lanes + l] = row[d];
    int64_t& held = rows.token_of[slot + l];
    if (held >= 0) rows.slot_of[held] = -1;
    held = tokens[l];
    rows.slot_of[tokens[l]] = slot + l;
  }
  parallel_for(chunks, std::max<int64_t>(1, kParallelWork / (kChunk * lanes * (dim + 1))),
               [&](int64_t first, int64_t last) {
                 std::vector<A> dots(kChunk * lanes), distances(kChunk);
                 for (int64_t c = first; c < last; ++c) {
                   const int64_t start = c * kChunk, width = std::min(kChunk, s.n - start), full = padded(width);
                   kernels.panel_dots(rows.panel.data(), dim, s.row(start), s.stride, width, dots.data());
                   for (int64_t l = 0; l < count; ++l) {
                     A* out = rows.potentials.data() + (slot + l) * rows.length + start;
                     for (int64_t i = 0; i < width; ++i) out[i] = dots[i * lanes + l];
                     for (int64_t i = width; i < full; ++i) out[i] = 0;
                     if (s.potential == Potential::kCosine) continue;
                     std::fill(distances.begin(), distances.end(), A(0));
                     for (int64_t a = 0; a < s.axes; ++a) {
                       const A* place = rows.places.data() + a * rows.length + start;
                       const A here = rows.places[a * rows.length + tokens[l]];
                       for (int64_t i = 0; i < full; ++i) distances[i] += (place[i] - here) * (place[i] - here);
                     }
                     own.potentials(s.potential, s.weights, distances.data(), full, out);
                   }
                 }
               });
}

template <class A>
int64_t sample_sum(const Sample<A>& s) {
  constexpr int64_t kPanels = 4;
  const RepulsionKernels<A>& own = repulsion_kernels<A>();
  const int64_t lanes = row_kernels<A>().panel_lanes, capacity = kPanels * lanes, length = padded(s.n);
  std::vector<char> available(s.n);
  const std::vector<int64_t> seeds = start_with_seeds(s, available);
  Rows<A> rows{s,
               length,
               std::vector<A>(s.axes * length),
               std::vector<A>(lanes * padded(s.dim)),
               std::vector<A>(capacity * length),
               std::vector<int64_t>(capacity, -1),
               std::vector<int64_t>(s.n, -1)};
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t a = 0; a < s.axes; ++a) rows.places[a * length + i] = s.positions[i * s.axes + a];
  // NaN in the totals takes a token out of the vectorised search, for ever.
  std::vector<A> totals(length, std::numeric_limits<A>::quiet_NaN()), energy(length), value(s.n);
  if (s.energy != nullptr) std::copy(s.energy, s.energy + s.n, energy.begin());
  for (int64_t i = 0; i < s.n; ++i)
    if (available[i]) totals[i] = 0;

  int64_t next = -1;
  // The vectorised search knows neither NaN nor +inf; with nothing else left the contract's order decides here.
  const auto settle = [&](int64_t found) {
    if (found >= 0) return found;
    for (int64_t i = 0; i < s.n; ++i) value[i] = totals[i] + energy[i];
    return best_of(value.data(), available, s.n);
  };
  if (seeds.empty()) {
    first_objective(s, value.data());
    next = best_of(value.data(), available, s.n);
  }
  for (size_t at = 0; at < seeds.size(); at += lanes) {
    const int64_t count = std::min<int64_t>(lanes, seeds.size() - at);
    compute_rows(rows, seeds.data() + at, count, 0);
    for (int64_t l = 0; l < count; ++l)
      next = own.add_and_pick(rows.potentials.data() + l * length, energy.data(), length, totals.data());
  }
  if (!seeds.empty()) next = settle(next);

  int64_t picked = 0, slot = 0;
  std::vector<Rank<A>> candidates;
  std::vector<int64_t> batch;
  while (next >= 0) {
    s.out[picked++] = next;
    available[next] = 0;
    if (picked == s.k) break;
    if (rows.slot_of[next] < 0) {
      if (picked > 1 || !seeds.empty())
        for (int64_t i = 0; i < s.n; ++i) value[i] = totals[i] + energy[i];
      candidates.clear();
      for (int64_t i = 0; i < s.n; ++i)
        if (available[i] && rows.slot_of[i] < 0) candidates.push_back(rank(value[i], i));
      const int64_t extra = std::min<int64_t>({lanes - 1, static_cast<int64_t>(candidates.size()), s.k - picked - 1});
      std::nth_element(candidates.begin(), candidates.begin() + extra, candidates.end());
      batch.assign(1, next);
      for (int64_t c = 0; c < extra; ++c) batch.push_back(candidates[c].second);
      compute_rows(rows, batch.data(), batch.size(), slot);
      slot = (slot + lanes) % capacity;
    }
    totals[next] = std::numeric_limits<A>::quiet_NaN();
    next = settle(
        own.add_and_pick(rows.potentials.data() + rows.slot_of[next] * length, energy.data(), length, totals.data()));
  }
  return picked;
}

// ---- The op ----

// Unit vectors of all tokens, rows `stride` apart and zero-padded.
template <class T, class A = Wide<T>>
void normalize_all(const Tensor& features, int64_t stride, A* unit) {
  const T* from = static_cast<const T*>(features.const_data_ptr());
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t n = features.size(1), dim = features.size(2);
  const int64_t batch_stride = features.stride(0), row_stride = features.stride(1);
  parallel_for(features.size(0) * n, grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* to = unit + i * stride;
      normalize_row(kernels, from + i / n * batch_stride + i % n * row_stride, dim, to);
      std::fill(to + dim, to + padded(dim), A(0));
    }
  });
}

std::tuple<Tensor, Tensor> repulsion_sample(const Tensor& features_in, int64_t k, const OptionalTensor& positions_in,
                                            const OptionalTensor& seeds_in, const OptionalTensor& energy_in,
                                            const OptionalTensor& mask_in, std::string potential, std::string aggregate,
                                            double feature_weight, double position_weight, double exponent,
                                            double sigma, double epsilon, std::string first) {
  const RepulsionKeywords words{potential, aggregate, first, feature_weight, position_weight, exponent, sigma, epsilon};
  const RepulsionChoice choice =
      check_repulsion_sample(features_in, k, positions_in, seeds_in, energy_in, mask_in, words);
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = features.size(0), n = features.size(1), dim = features.size(2);
  OptionalTensor seeds, mask, positions, energy;
  if (seeds_in) {
    seeds = contiguous_as(*seeds_in, ScalarType::Long);
    check_index_values("repulsion_sample", "seed_indices", seeds->const_data_ptr<int64_t>(), seeds->numel(), n);
  }
  if (mask_in) mask = contiguous_as(*mask_in, ScalarType::Bool);
  if (positions_in) positions = contiguous_as(*positions_in, wide_type(features));
  if (energy_in) energy = contiguous_as(*energy_in, wide_type(features));
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  std::fill(out, out + batch * k, int64_t(-1));
  std::fill(count, count + batch, int64_t(0));
  if (batch == 0 || n == 0 || k == 0) return {indices, counts};

  // Rows a power of two apart would compete for the same cache sets.
  const int64_t stride = padded(dim) + kRowMultiple;
  Tensor unit = new_empty(features, {batch, n, stride}, wide_type(features));
  dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    A* rows = unit.mutable_data_ptr<A>();
    normalize_all<T>(features, stride, rows);
    // Samples side by side when they keep the threads busy; the loops inside a sample then run on one thread each.
    parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t axes = positions ? positions->size(2) : 0, n_seeds = seeds ? seeds->size(1) : 0;
        const Sample<A> sample{rows + b * n * stride,
                               n,
                               dim,
                               stride,
                               positions ? positions->const_data_ptr<A>() + b * n * axes : nullptr,
                               axes,
                               energy ? energy->const_data_ptr<A>() + b * n : nullptr,
                               mask ? mask->const_data_ptr<bool>() + b * n : nullptr,
                               seeds ? seeds->const_data_ptr<int64_t>() + b * n_seeds : nullptr,
                               n_seeds,
                               choice.potential,
                               potential_weights<A>(words, positions.has_value()),
                               choice.first,
                               k,
                               out + b * k};
        count[b] = choice.sum ? sample_sum(sample) : sample_max(sample);
      }
    });
  });
  return {indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("repulsion_sample", TORCH_BOX(&repulsion_sample)); }

}  // namespace tokenprune
