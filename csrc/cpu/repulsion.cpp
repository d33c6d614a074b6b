// CPU kernel of repulsion_sample: repulsion_max.cpp and repulsion_sum.cpp, which never form an N x N matrix, and
// repulsion_gram.cpp for the one start that compares all pairs anyway. All products that enter U come from one kernel
// per strategy, whose bits do not depend on the batch or the thread, so that identical tokens get identical U and tie
// as the contract says.
#include "cpu/repulsion.h"

#include <tuple>

#include "cpu/capability.h"
#include "dispatch.h"
#include "op.h"

namespace tokenprune {

TOKENPRUNE_TABLE(RepulsionKernels<float>, repulsion_f32)
TOKENPRUNE_TABLE(RepulsionKernels<double>, repulsion_f64)

template <>
const RepulsionKernels<float>& repulsion_kernels<float>() {
  return TOKENPRUNE_CHOOSE(repulsion_f32);
}
template <>
const RepulsionKernels<double>& repulsion_kernels<double>() {
  return TOKENPRUNE_CHOOSE(repulsion_f64);
}

namespace {

std::tuple<Tensor, Tensor> repulsion_sample(const Tensor& features_in, int64_t k, const OptionalTensor& positions_in,
                                            const OptionalTensor& seeds_in, const OptionalTensor& energy_in,
                                            const OptionalTensor& mask_in, std::string potential, std::string aggregate,
                                            double feature_weight, double position_weight, double exponent,
                                            double sigma, double epsilon, std::string first) {
  const RepulsionSampleChoices choice =
      check_repulsion_sample(features_in, k, positions_in, seeds_in, energy_in, mask_in, potential, aggregate,
                             feature_weight, position_weight, exponent, sigma, epsilon, first);
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = features.size(0), n = features.size(1), dim = features.size(2);
  OptionalTensor seeds, mask, positions, energy;
  if (seeds_in) {
    seeds = contiguous_as(*seeds_in, ScalarType::Long);
    check_index_values("repulsion_sample", "seed_indices", *seeds, n);
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

  const int64_t stride = unit_stride(dim);
  Tensor unit = new_empty(features, {batch, n, stride}, wide_type(features));
  dispatch_floating(features.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Wide<T>;
    const auto weights =
        potential_weights<A>(feature_weight, position_weight, exponent, sigma, epsilon, positions.has_value());
    const auto run = [&](int64_t b, Team& team) {
      A* rows = unit.mutable_data_ptr<A>() + b * n * stride;
      normalize_sample<T>(team, features, b, rows);
      const int64_t axes = positions ? positions->size(2) : 0, n_seeds = seeds ? seeds->size(1) : 0;
      const Sample<A> sample{team,
                             rows,
                             n,
                             dim,
                             stride,
                             positions ? positions->const_data_ptr<A>() + b * n * axes : nullptr,
                             axes,
                             energy ? energy->const_data_ptr<A>() + b * n : nullptr,
                             mask ? mask_bytes(*mask) + b * n : nullptr,
                             seeds ? seeds->const_data_ptr<int64_t>() + b * n_seeds : nullptr,
                             n_seeds,
                             static_cast<Potential>(choice.potential),
                             weights,
                             static_cast<FirstPick>(choice.first),
                             k,
                             out + b * k};
      count[b] = choice.aggregate == 1 ? sample_sum(sample) : sample_max(sample);
    };
    over_samples_in_teams(batch, double(n) * dim * (std::min(k, n) + (seeds ? seeds->size(1) : 0)), run);
  });
  return {indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { TOKENPRUNE_IMPL(m, "repulsion_sample", repulsion_sample); }

}  // namespace tokenprune
