// CUDA binding of repulsion_sample: checks, allocation, launches.
#include "tokenprune/repulsion.h"

#include <tuple>

#include "args/repulsion.h"
#include "cuda/binding.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor> repulsion_sample(const Tensor& features_in, int64_t k, const OptionalTensor& positions_in,
                                            const OptionalTensor& seeds_in, const OptionalTensor& energy_in,
                                            const OptionalTensor& mask_in, std::string potential, std::string aggregate,
                                            double feature_weight, double position_weight, double exponent,
                                            double sigma, double epsilon, std::string first) {
  const char* op = "repulsion_sample";
  const RepulsionSampleChoices choice =
      check_repulsion_sample(features_in, k, positions_in, seeds_in, energy_in, mask_in, potential, aggregate,
                             feature_weight, position_weight, exponent, sigma, epsilon, first);
  check_not_float64(op, {{"features", features_in}});
  const CudaScope cuda(features_in);
  const Tensor features = with_contiguous_rows(features_in);
  const int64_t batch = features.size(0), n = features.size(1);
  OptionalTensor seeds, positions, energy;
  if (seeds_in) {
    seeds = contiguous_as(*seeds_in, ScalarType::Long);
    check_indices(op, "seed_indices", *seeds, n);
  }
  if (positions_in) positions = contiguous_as(*positions_in, ScalarType::Float);
  if (energy_in) energy = contiguous_as(*energy_in, ScalarType::Float);
  const MaskArgument mask(mask_in);
  Tensor indices = new_empty(features, {batch, k}, ScalarType::Long);
  Tensor counts = new_empty(features, {batch}, ScalarType::Long);
  const RepulsionProblem problem{
      features.const_data_ptr(),
      features.stride(0),
      features.stride(1),
      rows_start_aligned(features),
      positions ? positions->const_data_ptr<float>() : nullptr,
      positions ? positions->size(2) : 0,
      seeds ? seeds->const_data_ptr<int64_t>() : nullptr,
      seeds ? seeds->size(1) : 0,
      energy ? energy->const_data_ptr<float>() : nullptr,
      mask.data(),
      mask.stride(),
      static_cast<Potential>(choice.potential),
      potential_weights<float>(feature_weight, position_weight, exponent, sigma, epsilon, positions.has_value()),
      choice.aggregate == 1,
      static_cast<FirstPick>(choice.first),
      batch,
      n,
      features.size(2),
      k,
      indices.mutable_data_ptr<int64_t>(),
      counts.mutable_data_ptr<int64_t>()};
  const RepulsionPlan plan = plan_repulsion(problem, cuda.limits());
  Tensor floats = new_empty(features, {plan.floats()}, ScalarType::Float);
  Tensor integers = new_empty(features, {plan.words()}, ScalarType::Int);
  const cudaError_t status = dispatch_storage(features, [&](auto tag) {
    return launch_repulsion<typename decltype(tag)::type>(
        problem, plan, floats.mutable_data_ptr<float>(),
        reinterpret_cast<uint32_t*>(integers.mutable_data_ptr<int32_t>()), cuda.stream());
  });
  check_launch(op, status, {{"features", features}});
  return {indices, counts};
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) { TOKENPRUNE_IMPL(m, "repulsion_sample", repulsion_sample); }

}  // namespace tokenprune
