// CPU kernel of dpp_sample: greedy MAP of a determinantal point process by lazy rows of the incremental Cholesky factor
// (Chen et al., arXiv 1709.05135).
//
// L = diag(q) S diag(q), so that the factor is computed for the cosines S alone: with rows c_i and residuals r_i of S,
// a token multiplies the determinant by q_i^2 r_i, and neither overflows. The entries of c_i need nothing of any token
// but the picks, and r_i only falls: a token is compared with the picks no earlier than it may be picked itself
// (lazy.h). The cosines are made on the fly, K rows of them at most, and never the N x N matrix.
#include <cmath>
#include <memory>
#include <tuple>

#include "cpu/lazy.h"
#include "cpu/repulsion.h"
#include "dispatch.h"
#include "op.h"

namespace tokenprune {

namespace {

// Columns of the factor that are computed together. A block starts at a multiple of kBlock whatever a token has seen,
// which keeps the order of every sum, and with it the bits of equal tokens.
constexpr int64_t kBlock = kRowMultiple;

template <class A>
struct Factor {
  Team& team;
  const A* unit;
  int64_t n, dim, stride;
  const A* quality;  // or null
  A epsilon;

  int64_t width;                  // between two rows of the factor
  std::unique_ptr<A[]> rows;      // c_i, as far as it is computed
  std::vector<A> residual;        // r_i
  std::vector<int64_t> seen;      // entries of c_i
  std::vector<const A*> unit_of;  // of the picks that count, in order
  std::vector<const A*> row_of;   // their rows
  std::vector<A> root_of;         // sqrt(r_j) when they were picked
  std::vector<A> corner;          // corner[s * kBlock + t]: entry s of the pick t places after the start of its block
  std::vector<int64_t> batch;

  A squared_quality(int64_t i) const { return quality == nullptr ? A(1) : quality[i] * quality[i]; }
  A gain(int64_t i) const { return squared_quality(i) * residual[i]; }
  Rank<A> rank(int64_t i) const { return {order_key(gain(i)), i}; }
};

template <class A>
Factor<A> start_factor(Team& team, const A* unit, int64_t n, int64_t dim, const A* quality, A epsilon, int64_t k) {
  const int64_t width = padded(std::min(k, n));
  Factor<A> f{team, unit, n, dim, unit_stride(dim), quality, epsilon, width, nullptr, {}, {}, {}, {}, {}, {}, {}};
  f.rows.reset(new A[n * width]);  // not cleared: most of it is never touched
  f.residual.resize(n);
  f.seen.resize(n);
  team.parallel_for(n, grain(dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* row = unit + i * f.stride;
      repulsion_kernels<A>().pair_dots(&row, 1, &row, 1, padded(dim), &f.residual[i]);
      if (quality != nullptr && !std::isfinite(quality[i])) f.residual[i] = std::numeric_limits<A>::quiet_NaN();
    }
  });
  return f;
}

// Entries [begin, end) of the rows of up to kMaxPairRows tokens, all in one block:
// c_i,t = (S_it - sum over s < t of c_i,s c_t,s) / sqrt(r_t).
template <class A>
void extend(Factor<A>& f, const int64_t* tokens, int64_t count, int64_t begin, int64_t end) {
  const auto pair_dots = repulsion_kernels<A>().pair_dots;
  const int64_t block = begin / kBlock * kBlock, width = end - begin;
  const A *units[kMaxPairRows], *rows[kMaxPairRows];
  A cosine[kMaxPairRows * kBlock], inner[kMaxPairRows * kBlock];
  for (int64_t r = 0; r < count; ++r) {
    units[r] = f.unit + tokens[r] * f.stride;
    rows[r] = f.rows.get() + tokens[r] * f.width;
  }
  pair_dots(units, count, f.unit_of.data() + begin, width, padded(f.dim), cosine);
  pair_dots(rows, count, f.row_of.data() + begin, width, block, inner);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = tokens[r], from = f.seen[i];
    A* row = f.rows.get() + i * f.width;
    A left[kBlock] = {};  // of the numerators
    for (int64_t t = begin; t < end; ++t)
      left[t - block] = cosine[r * width + t - begin] - inner[r * width + t - begin];
    for (int64_t t = block; t < end; ++t) {
      if (t >= from) {
        row[t] = left[t - block] / f.root_of[t];
        f.residual[i] -= row[t] * row[t];
      }
      const A entry = row[t], *corner = f.corner.data() + t * kBlock;
      for (int64_t u = 0; u < kBlock; ++u) left[u] -= entry * corner[u];
    }
    f.seen[i] = std::max(from, end);
  }
}

// Tokens, sorted by what they have seen, up to the `last` picks; one that is found worse than `limit` stays behind. They
// go block by block together, so that those that have seen little are soon in groups with the others.
template <class A>
void bring_up(Factor<A>& f, const int64_t* tokens, int64_t count, int64_t last, const Rank<A>& limit) {
  for (int64_t block = f.seen[tokens[0]] / kBlock * kBlock; block < last; block += kBlock) {
    const int64_t end = std::min(block + kBlock, last);
    int64_t group[kMaxPairRows], size = 0, begin = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = tokens[r], from = std::max(f.seen[i], block);
      if (from >= end || !(f.rank(i) < limit)) continue;
      if (size == kMaxPairRows || (size > 0 && from > begin + kSpread)) {
        extend(f, group, size, begin, end);
        size = 0;
      }
      if (size == 0) begin = from;
      group[size++] = i;
    }
    if (size > 0) extend(f, group, size, begin, end);
  }
}

// A pick beyond the rank of the kernel does not count: its gain is a rounding error, which nothing may be divided by.
template <class A>
void count_pick(Factor<A>& f, int64_t j) {
  if (!(f.gain(j) > f.epsilon * f.squared_quality(j))) return;
  const int64_t t = f.unit_of.size(), block = t / kBlock * kBlock;
  const A* row = f.rows.get() + j * f.width;
  f.unit_of.push_back(f.unit + j * f.stride);
  f.row_of.push_back(row);
  f.root_of.push_back(std::sqrt(f.residual[j]));
  f.corner.resize((t + 1) * kBlock);
  for (int64_t s = block; s < t; ++s) f.corner[s * kBlock + t - block] = row[s];
}

// Picks into out and gains, and returns how many.
template <class A>
int64_t pick_all(Factor<A>& f, const uint8_t* mask, int64_t k, int64_t* out, A* gains) {
  std::vector<Rank<A>> heap;
  heap.reserve(f.n);
  for (int64_t i = 0; i < f.n; ++i)
    if (mask == nullptr || mask[i]) heap.push_back(f.rank(i));
  std::make_heap(heap.begin(), heap.end(), worse<Rank<A>>);
  int64_t picked = 0;
  while (picked < k && !heap.empty()) {
    const int64_t last = f.unit_of.size();
    const int64_t j = pop_best(
        heap, f.batch, [&](int64_t i) { return f.seen[i] == last; },
        [&](std::vector<int64_t>& tokens, const Rank<A>& limit) {
          in_pieces(f.team, tokens, f.seen, last, f.dim + last,
                    [&](const int64_t* piece, int64_t count) { bring_up(f, piece, count, last, limit); });
        },
        [&](int64_t i) { return f.rank(i); });
    out[picked] = j;
    gains[picked++] = f.gain(j);
    count_pick(f, j);
  }
  return picked;
}

std::tuple<Tensor, Tensor, Tensor> dpp_sample(const Tensor& features_in, int64_t k, const OptionalTensor& quality_in,
                                              const OptionalTensor& mask_in, double epsilon) {
  check_dpp_sample(features_in, k, quality_in, mask_in, epsilon);
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = features.size(0), n = features.size(1), dim = features.size(2);
  OptionalTensor quality, mask;
  if (quality_in) quality = contiguous_as(*quality_in, wide_type(features));
  if (mask_in) mask = contiguous_as(*mask_in, ScalarType::Bool);
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor gains = new_empty(features, {batch, k}, wide_type(features));
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  Tensor unit = new_empty(features, {batch, n, unit_stride(dim)}, wide_type(features));
  dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    int64_t* out = indices.mutable_data_ptr<int64_t>();
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    A* gain = gains.mutable_data_ptr<A>();
    std::fill(out, out + batch * k, int64_t(-1));
    std::fill(gain, gain + batch * k, A(0));
    over_samples_in_teams(batch, double(n) * dim * std::min(k, n), [&](int64_t b, Team& team) {
      A* rows = unit.mutable_data_ptr<A>() + b * n * unit_stride(dim);
      normalize_sample<T>(team, features, b, rows);
      Factor<A> factor = start_factor(team, rows, n, dim, quality ? quality->const_data_ptr<A>() + b * n : nullptr,
                                      static_cast<A>(epsilon), k);
      const uint8_t* allowed = mask ? mask_bytes(*mask) + b * n : nullptr;
      count[b] = pick_all(factor, allowed, k, out + b * k, gain + b * k);
    });
  });
  return {indices, gains, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "dpp_sample", dpp_sample); }

}  // namespace tokenprune
