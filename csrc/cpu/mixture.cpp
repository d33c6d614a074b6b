// AdaFV's adaptive mixture of a text-guided and a visual ranking on the CPU.

#include <cmath>
#include <tuple>

#include "cpu/selection_choose.h"
#include "dispatch.h"
#include "op.h"

namespace tokenprune {

namespace {

using Key = uint64_t;
using Token = Ranked<Key, int64_t>;

// One of the two score lists of a sample.
struct Ranking {
  explicit Ranking(int64_t n) : scores(n), keys(n), best(n), mass(n + 1) {}

  std::vector<double> scores;  // negative, NaN and masked count as 0
  std::vector<Key> keys;
  std::vector<int64_t> best;  // the tokens that may be kept, in candidate order
  std::vector<double> mass;   // mass[r] is what the first r after the reserved ones add up to
  int64_t listed = 0, collected = 0;

  double mass_of(int64_t r) const { return mass[std::min(r, collected)]; }
};

struct MixtureSpace {
  explicit MixtureSpace(int64_t n) : text(n), visual(n), scratch(n), chosen(n) {}
  Ranking text, visual;
  std::vector<Key> scratch;
  std::vector<uint8_t> chosen;
};

void read_scores(const Tensor& scores, int64_t sample, const uint8_t* mask, int64_t n, double* out) {
  dispatch_floating(scores.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* row = static_cast<const T*>(scores.const_data_ptr()) + sample * scores.stride(0);
    for (int64_t i = 0; i < n; ++i) {
      const double value = to_float(row[i]);
      out[i] = value > 0 && (mask == nullptr || mask[i]) ? value : 0.0;
    }
  });
}

// Lists the first reserved + rest tokens and sums up those after the reserved ones.
void rank(Ranking& list, const uint8_t* mask, int64_t n, int64_t reserved, int64_t rest, MixtureSpace& space) {
  for (int64_t i = 0; i < n; ++i) list.keys[i] = order_key(list.scores[i], mask == nullptr || mask[i]);
  std::fill(space.chosen.begin(), space.chosen.end(), uint8_t(0));
  choose_best(list.keys.data(), n, reserved + rest, space.scratch.data(), space.chosen.data());
  list.listed = list_ascending(space.chosen.data(), n, n, list.best.data());
  std::sort(list.best.begin(), list.best.begin() + list.listed,
            [&](int64_t i, int64_t j) { return Token{list.keys[i], i} < Token{list.keys[j], j}; });
  list.collected = std::max<int64_t>(list.listed - reserved, 0);
  list.mass[0] = 0;
  for (int64_t r = 0; r < list.collected; ++r) list.mass[r + 1] = list.mass[r] + list.scores[list.best[reserved + r]];
}

// The smallest r that maximises P_text(r) * P_visual(rest - r); 0 * inf counts as 0.
int64_t best_split(const Ranking& text, const Ranking& visual, int64_t rest) {
  int64_t split = 0;
  double most = -1;
  for (int64_t r = 0; r <= rest; ++r) {
    const double product = text.mass_of(r) * visual.mass_of(rest - r);
    if (product > most || (product != product && most < 0)) {
      split = r;
      most = product == product ? product : 0;
    }
  }
  return split;
}

double total(const std::vector<double>& scores) {
  double sum = 0;
  for (double s : scores) sum += s;
  return sum;
}

// s / sum, where 0 / 0 and inf / inf count as 0.
double share(double score, double sum) {
  const double part = score / sum;
  return part == part ? part : 0;
}

// Leaves the choice in space.chosen and returns how many slots the text ranking got.
int64_t mix(const uint8_t* mask, int64_t n, int64_t k, int64_t reserved, MixtureSpace& space) {
  const int64_t rest = k - 2 * reserved;
  Ranking &text = space.text, &visual = space.visual;
  rank(text, mask, n, reserved, rest, space);
  rank(visual, mask, n, reserved, rest, space);
  const int64_t r = best_split(text, visual, rest);

  uint8_t* chosen = space.chosen.data();
  std::fill(chosen, chosen + n, uint8_t(0));
  for (int64_t i = 0; i < std::min(reserved + r, text.listed); ++i) chosen[text.best[i]] = 1;
  for (int64_t i = 0; i < std::min(reserved + rest - r, visual.listed); ++i) chosen[visual.best[i]] = 1;
  int64_t free = k;
  for (int64_t i = 0; i < n; ++i) free -= chosen[i];
  if (free > 0) {
    const double text_sum = total(text.scores), visual_sum = total(visual.scores);
    for (int64_t i = 0; i < n; ++i) {
      const double value = std::max(share(text.scores[i], text_sum), share(visual.scores[i], visual_sum));
      text.keys[i] = order_key(value, (mask == nullptr || mask[i]) && !chosen[i]);
    }
    choose_best(text.keys.data(), n, free, space.scratch.data(), chosen);
  }
  return reserved + r;
}

std::tuple<Tensor, Tensor, Tensor> select_mixture(const Tensor& text_in, const Tensor& visual_in, int64_t k,
                                                  double floor, const OptionalTensor& mask_in) {
  check_select_mixture(text_in, visual_in, k, floor, mask_in);
  const Tensor text = with_contiguous_rows(text_in), visual = with_contiguous_rows(visual_in);
  const MaskRows mask(mask_in);
  const int64_t batch = text.size(0), n = text.size(1);
  Tensor indices = new_empty(text, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(text, {batch}, ScalarType::Long);
  Tensor num_text = new_empty(text, {batch}, ScalarType::Long);
  int64_t* index = indices.mutable_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  int64_t* of_text = num_text.mutable_data_ptr<int64_t>();
  const auto reserved = static_cast<int64_t>(std::floor(floor * static_cast<double>(k)));
  over_samples<MixtureSpace>(batch, n, [&](int64_t b, MixtureSpace& space) {
    const uint8_t* allowed = mask.row(b);
    read_scores(text, b, allowed, n, space.text.scores.data());
    read_scores(visual, b, allowed, n, space.visual.scores.data());
    of_text[b] = mix(allowed, n, k, reserved, space);
    count[b] = list_ascending(space.chosen.data(), n, k, index + b * k);
  });
  return {indices, counts, num_text};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "select_mixture", select_mixture); }

}  // namespace tokenprune
