// sum: speculation. Every token needs the row of every selected one, but rows can be computed early, many at once, by
// a matrix product. Which ones is predicted by running the sampler ahead among the best candidates so far only;
// as long as the true picks are among the predicted ones, a step is one pass over N numbers. A wrong prediction costs
// time, never exactness: each step looks at every token.
#include <memory>

#include "cpu/repulsion.h"

namespace tokenprune {

namespace {

constexpr int64_t kBatch = 32;   // rows computed at once: a multiple of every panel width
constexpr int64_t kKept = 512;   // rows that are kept, at most
constexpr int64_t kActive = 96;  // candidates that a prediction runs among: a multiple of every panel width
constexpr int64_t kChunk = 64;   // tokens per block of a matrix product

template <class A>
struct Rows {
  const Sample<A>& sample;
  int64_t length, capacity;         // n, padded; slots for rows
  std::vector<A> coordinates;       // the positions by axis, [axes][length]
  std::unique_ptr<A[]> panels;      // kActive tokens at most
  std::unique_ptr<A[]> potentials;  // [capacity][length]
  std::vector<int64_t> token_of;    // slot -> token, or -1
  std::vector<int64_t> slot_of;     // token -> slot, or -1
  int64_t next_slot;
  std::unique_ptr<A[]> active;  // the rows of the active tokens, one after the other
  std::unique_ptr<A[]> gram;    // their potentials, [kActive][kActive]

  const A* row(int64_t token) const { return potentials.get() + slot_of[token] * length; }
};

// A prediction pays when it is cheap next to the rows it saves.
template <class A>
bool predicts(const Sample<A>& s) {
  return s.n > 2 * kActive;
}

template <class A>
Rows<A> start_rows(const Sample<A>& s) {
  const int64_t length = padded(s.n), dim = padded(s.dim), stride = dim + kRowMultiple;
  const int64_t capacity = std::min(kKept, (s.n + kBatch - 1) / kBatch * kBatch);
  const auto fresh = [](int64_t size) { return std::unique_ptr<A[]>(new A[size]); };  // not cleared
  Rows<A> rows{s,
               length,
               capacity,
               std::vector<A>(s.axes * length),
               fresh((predicts(s) ? kActive : kBatch) * dim),
               fresh(capacity * length),
               std::vector<int64_t>(capacity, -1),
               std::vector<int64_t>(s.n, -1),
               0,
               fresh(predicts(s) ? kActive * stride : 0),
               fresh(predicts(s) ? kActive * kActive : 0)};
  for (int64_t i = 0; i < s.n; ++i)
    for (int64_t a = 0; a < s.axes; ++a) rows.coordinates[a * length + i] = s.positions[i * s.axes + a];
  return rows;
}

template <class A>
void pack_panels(Rows<A>& rows, const int64_t* tokens, int64_t count) {
  const Sample<A>& s = rows.sample;
  const int64_t lanes = row_kernels<A>().panel_lanes, dim = padded(s.dim);
  s.team.parallel_for(count, grain(4 * dim), [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const A* row = s.row(tokens[l]);
      A* to = rows.panels.get() + l / lanes * lanes * dim + l % lanes;
      for (int64_t d = 0; d < dim; ++d) to[d * lanes] = row[d];
    }
  });
}

// phi of `count` tokens, kBatch at most, with every token; the oldest rows give way.
template <class A>
void compute_rows(Rows<A>& rows, const int64_t* tokens, int64_t count) {
  const Sample<A>& s = rows.sample;
  const RowKernels<A>& kernels = row_kernels<A>();
  const RepulsionKernels<A>& own = repulsion_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, dim = padded(s.dim), chunks = (s.n + kChunk - 1) / kChunk;
  pack_panels(rows, tokens, count);
  for (int64_t l = 0; l < count; ++l) {
    int64_t& held = rows.token_of[rows.next_slot];
    if (held >= 0) rows.slot_of[held] = -1;
    held = tokens[l];
    rows.slot_of[held] = rows.next_slot;
    rows.next_slot = (rows.next_slot + 1) % rows.capacity;
  }
  const int64_t work = kChunk * kBatch * (dim + 16);
  s.team.parallel_for(chunks, std::max<int64_t>(1, kParallelWork / work), [&](int64_t first, int64_t last) {
    A dots[kChunk * kBatch], distances[kChunk];
    for (int64_t c = first; c < last; ++c) {
      const int64_t start = c * kChunk, width = std::min(kChunk, s.n - start), full = padded(width);
      for (int64_t p = 0; p < count; p += lanes) {
        kernels.panel_dots(rows.panels.get() + p * dim, dim, s.row(start), s.stride, width, dots);
        for (int64_t l = p; l < std::min(p + lanes, count); ++l) {
          A* out = rows.potentials.get() + rows.slot_of[tokens[l]] * rows.length + start;
          for (int64_t i = 0; i < width; ++i) out[i] = dots[i * lanes + l - p];
          for (int64_t i = width; i < full; ++i) out[i] = 0;
          if (s.potential == Potential::kCosine) continue;
          std::fill(distances, distances + kChunk, A(0));
          for (int64_t a = 0; a < s.axes; ++a) {
            const A* axis = rows.coordinates.data() + a * rows.length + start;
            const A here = rows.coordinates[a * rows.length + tokens[l]];
            for (int64_t i = 0; i < full; ++i) distances[i] += (axis[i] - here) * (axis[i] - here);
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
  pack_panels(rows, active.data(), count);
  s.team.parallel_for(
      (count + kKeys - 1) / kKeys, std::max<int64_t>(1, kParallelWork / (kKeys * kActive * (dim + 16))),
      [&](int64_t first, int64_t last) {
        A dots[kKeys * kBatch], distances[kActive];
        for (int64_t c = first; c < last; ++c) {
          const int64_t start = c * kKeys, width = std::min(kKeys, count - start), full = padded(count);
          for (int64_t r = start; r < start + width; ++r)
            std::copy(s.row(active[r]), s.row(active[r]) + dim, rows.active.get() + r * stride);
          for (int64_t p = 0; p < count; p += lanes) {
            kernels.panel_dots(rows.panels.get() + p * dim, dim, rows.active.get() + start * stride, stride, width,
                               dots);
            for (int64_t r = 0; r < width; ++r)
              std::copy(dots + r * lanes, dots + (r + 1) * lanes, rows.gram.get() + (start + r) * kActive + p);
          }
          if (s.potential == Potential::kCosine) continue;
          for (int64_t r = start; r < start + width; ++r) {
            std::fill(distances, distances + full, A(0));
            if (s.positions != nullptr)
              for (int64_t l = 0; l < count; ++l) distances[l] = squared_distance(s, active[r], active[l]);
            repulsion_kernels<A>().potentials(s.potential, s.weights, distances, full, rows.gram.get() + r * kActive);
          }
        }
      });
}

// Runs the sampler ahead among `active`, whose first token was just picked, and leaves there that one and up to
// `wanted` tokens without a row, in the order in which they were picked.
template <class A>
void predict(Rows<A>& rows, std::vector<int64_t>& active, const A* value, int64_t wanted) {
  const int64_t count = active.size();
  compute_gram(rows, active);
  std::vector<A> ahead(count);
  std::vector<char> open(count, 1);
  std::vector<int64_t> found;
  for (int64_t l = 0; l < count; ++l) ahead[l] = value[active[l]];
  for (int64_t l = 0; l >= 0; l = best_of(ahead.data(), open, count)) {
    if (rows.slot_of[active[l]] < 0) found.push_back(active[l]);
    if (static_cast<int64_t>(found.size()) > wanted) break;
    open[l] = 0;
    const A* phi = rows.gram.get() + l * kActive;
    for (int64_t other = 0; other < count; ++other) ahead[other] += phi[other];
  }
  active = std::move(found);
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
    return own.add_and_pick(rows.row(token), energy.data(), length, totals.data());
  };

  int64_t next = -1;
  if (seeds.empty()) next = first_pick(s, available, value.data());
  for (size_t at = 0; at < seeds.size(); at += kBatch) {
    const int64_t count = std::min<int64_t>(kBatch, seeds.size() - at);
    compute_rows(rows, seeds.data() + at, count);
    for (int64_t l = 0; l < count; ++l) next = add(seeds[at + l]);
  }
  // The vectorised search knows neither NaN nor +inf: when nothing else is left, the contract's order decides here.
  const auto settle = [&](int64_t found) {
    if (found >= 0) return found;
    evaluate();
    return best_of(value.data(), available, s.n);
  };
  if (!seeds.empty()) next = settle(next);

  int64_t picked = 0;
  std::vector<Rank<A>> candidates;
  std::vector<int64_t> batch;
  while (next >= 0) {
    s.out[picked++] = next;
    available[next] = 0;
    if (picked == s.k) break;
    if (rows.slot_of[next] < 0) {
      if (picked > 1 || !seeds.empty()) evaluate();
      const bool predicting = predicts(s);
      const int64_t wanted = std::min<int64_t>(kBatch - 1, s.k - picked - 1);
      candidates.clear();
      for (int64_t i = 0; i < s.n; ++i)
        if (available[i] && (predicting || rows.slot_of[i] < 0)) candidates.push_back(rank(value[i], i));
      const int64_t active = std::min<int64_t>(candidates.size(), predicting ? kActive - 1 : wanted);
      std::nth_element(candidates.begin(), candidates.begin() + active, candidates.end());
      batch.assign(1, next);
      for (int64_t c = 0; c < active; ++c) batch.push_back(candidates[c].index);
      if (predicting) predict(rows, batch, value.data(), wanted);
      compute_rows(rows, batch.data(), batch.size());
    }
    totals[next] = std::numeric_limits<A>::quiet_NaN();
    next = settle(add(next));
  }
  return picked;
}

template int64_t sample_sum(const Sample<float>&);
template int64_t sample_sum(const Sample<double>&);

}  // namespace tokenprune
