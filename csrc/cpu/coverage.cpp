// CPU kernel of coverage_sample: greedy facility location by lazy evaluation (Minoux, 1978). A gain only falls as rows
// are covered, rounding included (simd/coverage.h), so that one from an earlier step bounds the present one.
//
// The gain of a token reads its column, which similarity [R, N] scatters over R rows: they are transposed once, and
// rows that do not count are left out.
#include <memory>
#include <tuple>

#include "cpu/capability.h"
#include "cpu/lazy.h"
#include "cpu/simd/coverage.h"
#include "dispatch.h"
#include "op.h"

namespace tokenprune {

TOKENPRUNE_TABLE(CoverageKernels<float>, coverage_f32)
TOKENPRUNE_TABLE(CoverageKernels<double>, coverage_f64)

template <>
const CoverageKernels<float>& coverage_kernels<float>() {
  return TOKENPRUNE_CHOOSE(coverage_f32);
}
template <>
const CoverageKernels<double>& coverage_kernels<double>() {
  return TOKENPRUNE_CHOOSE(coverage_f64);
}

namespace {

// NaN and negative values count as 0.
template <class A>
A positive(A x) {
  return x > 0 ? x : A(0);
}

template <class A>
struct Cover {
  int64_t n, rows, stride;         // rows that count, padded; elements between two columns
  std::unique_ptr<A[]> columns;    // [n, stride]
  std::vector<A> weight, covered;  // [rows]
  std::vector<A> gain;             // as of the last step that evaluated it
  std::vector<int64_t> seen;       // how many of the picks that covered something the gain is about
  std::vector<int64_t> batch;

  const A* column(int64_t i) const { return columns.get() + i * stride; }
  Rank<A> rank(int64_t i) const { return {order_key(gain[i]), i}; }
};

// Rows `listed` of similarity [R, N], `row_stride` apart, as columns.
template <class T, class A>
void transpose(Team& team, const T* similarity, int64_t row_stride, const std::vector<int64_t>& listed, Cover<A>& c) {
  constexpr int64_t kChunk = 64;
  const RowKernels<A>& kernels = row_kernels<A>();
  const int64_t lanes = kernels.panel_lanes, count = listed.size();
  team.parallel_for((c.n + kChunk - 1) / kChunk, grain(kChunk * c.rows) / kMaxPairRows,
                    [&](int64_t begin, int64_t end) {
                      std::vector<A> tile(lanes * kChunk), panel(lanes * kChunk);
                      for (int64_t i = begin * kChunk; i < std::min(end * kChunk, c.n); i += kChunk) {
                        const int64_t width = std::min(kChunk, c.n - i);
                        for (int64_t r = 0; r < c.rows; r += lanes) {
                          const int64_t present = std::clamp<int64_t>(count - r, 0, lanes);
                          for (int64_t l = 0; l < present; ++l) {
                            const T* from = similarity + listed[r + l] * row_stride + i;
                            for (int64_t d = 0; d < width; ++d) tile[l * kChunk + d] = positive(to_float(from[d]));
                          }
                          kernels.pack_panel(tile.data(), kChunk, present, width, panel.data());
                          for (int64_t d = 0; d < width; ++d)
                            std::copy_n(panel.data() + d * lanes, lanes, c.columns.get() + (i + d) * c.stride + r);
                        }
                      }
                    });
}

// The rows of sample b that count, transposed, and nothing covered yet.
template <class T, class A = Wide<T>>
Cover<A> start_cover(Team& team, const Tensor& similarity, int64_t b, const A* weight, const uint8_t* row_mask) {
  const T* from = static_cast<const T*>(similarity.const_data_ptr()) + b * similarity.stride(0);
  std::vector<int64_t> listed;
  std::vector<A> weights;
  for (int64_t r = 0; r < similarity.size(1); ++r) {
    const A own = weight == nullptr ? A(1) : positive(weight[r]);
    if (own == 0 || (row_mask != nullptr && !row_mask[r])) continue;
    listed.push_back(r);
    weights.push_back(own);
  }
  const int64_t n = similarity.size(2);
  const int64_t rows = (static_cast<int64_t>(listed.size()) + kCoverMultiple - 1) / kCoverMultiple * kCoverMultiple;
  weights.resize(rows);
  // Columns a power of two apart would compete for the same cache sets.
  Cover<A> c{n, rows, rows + kRowMultiple, nullptr, std::move(weights), std::vector<A>(rows), {}, {}, {}};
  c.columns.reset(new A[c.n * c.stride]);
  c.gain.resize(n);
  c.seen.resize(n);
  transpose(team, from, similarity.stride(1), listed, c);
  return c;
}

// Covers the rows by token j. Whether any of them is covered better than before.
template <class A>
bool cover_by(Cover<A>& c, int64_t j) {
  const A* column = c.column(j);
  bool better = false;
  for (int64_t r = 0; r < c.rows; ++r) {
    better |= column[r] > c.covered[r];
    c.covered[r] = std::max(c.covered[r], column[r]);
  }
  return better;
}

// Picks into out and gains, and returns how many.
template <class A>
int64_t pick_all(Team& team, Cover<A>& c, const A* quality, const uint8_t* mask, int64_t k, int64_t* out, A* gains) {
  int64_t last = 0;  // picks that covered something
  const auto evaluate = [&](std::vector<int64_t>& tokens, const Rank<A>&) {
    team.parallel_for(tokens.size(), grain(c.rows), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = tokens[t];
        const A sum = coverage_kernels<A>().uncovered(c.column(i), c.covered.data(), c.weight.data(), c.rows);
        c.gain[i] = quality == nullptr ? sum : positive(quality[i]) * sum;
        c.seen[i] = last;
      }
    });
  };
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < c.n; ++i)
    if (mask == nullptr || mask[i]) tokens.push_back(i);
  evaluate(tokens, worst_rank<A>());
  std::vector<Rank<A>> heap;
  heap.reserve(tokens.size());
  for (const int64_t i : tokens) heap.push_back(c.rank(i));
  std::make_heap(heap.begin(), heap.end(), worse<Rank<A>>);
  int64_t picked = 0;
  while (picked < k && !heap.empty()) {
    const int64_t j = pop_best(
        heap, c.batch, [&](int64_t i) { return c.seen[i] == last; }, evaluate, [&](int64_t i) { return c.rank(i); });
    out[picked] = j;
    gains[picked++] = c.gain[j];
    last += cover_by(c, j);
  }
  return picked;
}

std::tuple<Tensor, Tensor, Tensor> coverage_sample(const Tensor& similarity_in, int64_t k,
                                                   const OptionalTensor& row_weights_in,
                                                   const OptionalTensor& quality_in, const OptionalTensor& row_mask_in,
                                                   const OptionalTensor& mask_in) {
  check_coverage_sample(similarity_in, k, row_weights_in, quality_in, row_mask_in, mask_in);
  const Tensor similarity = with_contiguous_rows(similarity_in);
  const int64_t batch = similarity.size(0), rows = similarity.size(1), n = similarity.size(2);
  OptionalTensor weights, quality, row_mask, mask;
  if (row_weights_in) weights = contiguous_as(*row_weights_in, wide_type(similarity));
  if (quality_in) quality = contiguous_as(*quality_in, wide_type(similarity));
  if (row_mask_in) row_mask = contiguous_as(*row_mask_in, ScalarType::Bool);
  if (mask_in) mask = contiguous_as(*mask_in, ScalarType::Bool);
  Tensor indices = new_empty(similarity, {batch, k}, ScalarType::Long);
  Tensor gains = new_empty(similarity, {batch, k}, wide_type(similarity));
  Tensor counts = new_empty(similarity, {batch}, ScalarType::Long);
  dispatch_floating(similarity.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    int64_t* out = indices.mutable_data_ptr<int64_t>();
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    A* gain = gains.mutable_data_ptr<A>();
    std::fill(out, out + batch * k, int64_t(-1));
    std::fill(gain, gain + batch * k, A(0));
    const auto row_of = [](const OptionalTensor& t, int64_t offset) {
      return t ? t->const_data_ptr<A>() + offset : nullptr;
    };
    // All columns are evaluated once, and a few of them in every step.
    over_samples_in_teams(batch, double(n) * rows * 2, [&](int64_t b, Team& team) {
      if (k == 0 || n == 0) {
        count[b] = 0;
        return;
      }
      Cover<A> cover = start_cover<T>(team, similarity, b, row_of(weights, b * rows),
                                      row_mask ? mask_bytes(*row_mask) + b * rows : nullptr);
      count[b] = pick_all(team, cover, row_of(quality, b * n), mask ? mask_bytes(*mask) + b * n : nullptr, k,
                          out + b * k, gain + b * k);
    });
  });
  return {indices, gains, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "coverage_sample", coverage_sample); }

}  // namespace tokenprune
