// sum: speculation. Every token needs the row of every selected one, but rows can be computed early, many at once, by
// a matrix product. Which ones is predicted by running the sampler ahead among the best candidates of the moment only;
// as long as the true picks are among the predicted ones, a step is one pass over N numbers. A wrong prediction costs
// time, never exactness: each step looks at every token.
#include "cpu/repulsion.h"

namespace tokenprune {

namespace {

constexpr int64_t kBatch = 32;    // rows computed at once: a multiple of every panel width
constexpr int64_t kBatches = 4;   // how many batches are kept
constexpr int64_t kActive = 128;  // candidates that a prediction runs among
constexpr int64_t kChunk = 64;    // tokens per block of a matrix product

template <class A>
struct Rows {
  const Sample<A>& sample;
  int64_t length;                 // n, padded
  std::vector<A> places;          // the positions by axis, [axes][length]
  std::vector<A> panels;          // kActive tokens
  std::vector<A> potentials;      // [kBatch * kBatches][length]
  std::vector<int64_t> token_of;  // slot -> token, or -1
  std::vector<int64_t> slot_of;   // token -> slot, or -1
  std::vector<A> active;          // the rows of the active tokens, one after the other
  std::vector<A> gram;            // their potentials, [kActive][kActive]
};

template <class A>
Rows<A> start_rows(const Sample<A>& s) {
  const int64_t length = padded(s.n), dim = padded(s.dim);
  Rows<A> rows{s,
               length,
               std::vector<A>(s.axes * length),
               std::vector<A>(kActive * dim),
               std::vector<A>(kBatch * kBatches * length),
               std::vector<int64_t>(kBatch * kBatches, -1),
               std::vector<int64_t>(s.n, -1),
               {},
               {}};
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t a = 0; a < s.axes; ++a) rows.places[a * length + i] = s.positions[i * s.axes + a];
  return rows;
}

template <class A>
void pack_panels(Rows<A>& rows, const int64_t* tokens, int64_t count) {
  const Sample<A>& s = rows.sample;
  const int64_t lanes = row_kernels<A>().panel_lanes, dim = padded(s.dim);
  parallel_for(count, grain(4 * dim), [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const A* row = s.row(tokens[l]);
      A* to = rows.panels.data() + l / lanes * lanes * dim + l % lanes;
      for (int64_t d = 0; d < dim; ++d) to[d * lanes] = row[d];
    }
  });
}

// phi of `count` tokens with every token, into the slots from `slot` on.
template <class A>
void compute_rows(Rows<A>& rows, const int64_t* tokens, int64_t count, int64_t slot) {
  const Sample<A>& s = rows.sample;
  const RowKernels<A>& kernels = row_kernels<A>();
  const RepulsionKernels<A>& own = repulsion_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = padded(s.dim), chunks = (s.n + kChunk - 1) / kChunk;
  pack_panels(rows, tokens, count);
  for (int64_t l = 0; l < count; ++l) {
    int64_t& held = rows.token_of[slot + l];
    if (held >= 0) rows.slot_of[held] = -1;
    held = tokens[l];
    rows.slot_of[tokens[l]] = slot + l;
  }
  const int64_t work = kChunk * kBatch * (dim + 16);
  parallel_for(chunks, std::max<int64_t>(1, kParallelWork / work), [&](int64_t first, int64_t last) {
    A dots[kChunk * kBatch], distances[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const int64_t start = c * kChunk, width = std::min(kChunk, s.n - start), full = padded(width);
      for (int64_t p = 0; p < count; p += lanes) {
        kernels.panel_dots(rows.panels.data() + p * dim, dim, s.row(start), s.stride, width, dots);
        for (int64_t l = p; l < std::min(p + lanes, count); ++l) {
          A* out = rows.potentials.data() + (slot + l) * rows.length + start;
          for (int64_t i = 0; i < width; ++i) out[i] = dots[i * lanes + l - p];
          for (int64_t i = width; i < full; ++i) out[i] = 0;
          if (s.potential == Potential::kCosine) continue;
          std::fill(distances, distances + kChunk, A(0));
          for (int64_t a = 0; a < s.axes; ++a) {
            const A* place = rows.places.data() + a * rows.length + start;
            const A here = rows.places[a * rows.length + tokens[l]];
            for (int64_t i = 0; i < full; ++i) distances[i] += (place[i] - here) * (place[i] - here);
          }
          own.potentials(s.potential, s.weights, distances, full, out);
        }
      }
    }
  });
}

// phi between the active tokens, into rows.gram.
template <class A>
void compute_gram(Rows<A>& rows, const std::vector<int64_t>& active) {
  constexpr int64_t kKeys = 16;
  const Sample<A>& s = rows.sample;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = padded(s.dim), stride = dim + kRowMultiple, count = active.size();
  rows.active.resize(kActive * stride);
  rows.gram.resize(kActive * kActive);
  pack_panels(rows, active.data(), count);
  parallel_for(
      (count + kKeys - 1) / kKeys, std::max<int64_t>(1, kParallelWork / (kKeys * kActive * (dim + 16))),
      [&](int64_t first, int64_t last) {
        A dots[kKeys * kBatch], distances[kActive];
        for (int64_t c = first; c < last; ++c) {
          const int64_t start = c * kKeys, width = std::min(kKeys, count - start), full = padded(count);
          for (int64_t r = start; r < start + width; ++r)
            std::copy(s.row(active[r]), s.row(active[r]) + dim, rows.active.data() + r * stride);
          for (int64_t p = 0; p < count; p += lanes) {
            kernels.panel_dots(rows.panels.data() + p * dim, dim, rows.active.data() + start * stride, stride, width,
                               dots);
            for (int64_t r = 0; r < width; ++r)
              std::copy(dots + r * lanes, dots + (r + 1) * lanes, rows.gram.data() + (start + r) * kActive + p);
          }
          if (s.potential == Potential::kCosine) continue;
          for (int64_t r = start; r < start + width; ++r) {
            std::fill(distances, distances + full, A(0));
            if (s.positions != nullptr)
              for (int64_t l = 0; l < count; ++l) distances[l] = squared_distance(s, active[r], active[l]);
            repulsion_kernels<A>().potentials(s.potential, s.weights, distances, full, rows.gram.data() + r * kActive);
          }
        }
      });
}

// Reorders `active`, whose first token was just picked: the tokens likely to be picked next come first.
template <class A>
void predict(Rows<A>& rows, std::vector<int64_t>& active, const A* value, int64_t steps) {
  const int64_t count = active.size();
  compute_gram(rows, active);
  std::vector<A> ahead(count);
  std::vector<char> open(count, 1);
  for (int64_t l = 0; l < count; ++l) ahead[l] = value[active[l]];
  std::vector<int64_t> order{0};
  open[0] = 0;
  for (int64_t t = 0; t < std::min(steps, count - 1); ++t) {
    const A* phi = rows.gram.data() + order.back() * kActive;
    for (int64_t l = 0; l < count; ++l) ahead[l] += phi[l];
    order.push_back(best_of(ahead.data(), open, count));
    open[order.back()] = 0;
  }
  for (int64_t& l : order) l = active[l];
  active = std::move(order);
}

}  // namespace

template <class A>
int64_t sample_sum(const Sample<A>& s) {
  const RepulsionKernels<A>& own = repulsion_kernels<A>();
  std::vector<char> available(s.n);
  const std::vector<int64_t> seeds = start_with_seeds(s, available);
  Rows<A> rows = start_rows(s);
  const int64_t length = rows.length;
  // NaN in the totals takes a token out of the vectorised search, for ever.
  std::vector<A> totals(length, std::numeric_limits<A>::quiet_NaN()), energy(length), value(s.n);
  if (s.energy != nullptr) std::copy(s.energy, s.energy + s.n, energy.begin());
  for (int64_t i = 0; i < s.n; ++i)
    if (available[i]) totals[i] = 0;
  const auto evaluate = [&] {
    for (int64_t i = 0; i < s.n; ++i) value[i] = totals[i] + energy[i];
  };
  const auto add = [&](int64_t token) {
    return own.add_and_pick(rows.potentials.data() + rows.slot_of[token] * length, energy.data(), length,
                            totals.data());
  };

  int64_t next = -1;
  if (seeds.empty()) next = first_pick(s, available, value.data());
  for (size_t at = 0; at < seeds.size(); at += kBatch) {
    const int64_t count = std::min<int64_t>(kBatch, seeds.size() - at);
    compute_rows(rows, seeds.data() + at, count, 0);
    for (int64_t l = 0; l < count; ++l) next = add(seeds[at + l]);
  }
  // The vectorised search knows neither NaN nor +inf: when nothing else is left, the contract's order decides here.
  const auto settle = [&](int64_t found) {
    if (found >= 0) return found;
    evaluate();
    return best_of(value.data(), available, s.n);
  };
  if (!seeds.empty()) next = settle(next);

  int64_t picked = 0, slot = 0;
  std::vector<Rank<A>> candidates;
  std::vector<int64_t> batch;
  while (next >= 0) {
    s.out[picked++] = next;
    available[next] = 0;
    if (picked == s.k) break;
    if (rows.slot_of[next] < 0) {
      if (picked > 1 || !seeds.empty()) evaluate();
      candidates.clear();
      for (int64_t i = 0; i < s.n; ++i)
        if (available[i] && rows.slot_of[i] < 0) candidates.push_back(rank(value[i], i));
      const int64_t wanted = std::min<int64_t>(kBatch - 1, s.k - picked - 1), some = candidates.size();
      const int64_t active = std::min(some, s.n > 2 * kActive ? kActive - 1 : wanted);
      std::nth_element(candidates.begin(), candidates.begin() + active, candidates.end());
      batch.assign(1, next);
      for (int64_t c = 0; c < active; ++c) batch.push_back(candidates[c].second);
      if (active > wanted) predict(rows, batch, value.data(), wanted);
      compute_rows(rows, batch.data(), batch.size(), slot);
      slot = (slot + kBatch) % (kBatch * kBatches);
    }
    totals[next] = std::numeric_limits<A>::quiet_NaN();
    next = settle(add(next));
  }
  return picked;
}

template int64_t sample_sum(const Sample<float>&);
template int64_t sample_sum(const Sample<double>&);

}  // namespace tokenprune
