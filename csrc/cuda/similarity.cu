// The similarity kernels for every storage type.
#include "tokenprune/similarity_paired.cuh"
#include "tokenprune/similarity_tile.cuh"

namespace tokenprune {

template cudaError_t launch_similarity<float>(const SimilarityProblem&, const SimilarityPlan&, CallStream&);
template cudaError_t launch_similarity<__half>(const SimilarityProblem&, const SimilarityPlan&, CallStream&);
template cudaError_t launch_similarity<__nv_bfloat16>(const SimilarityProblem&, const SimilarityPlan&, CallStream&);

template cudaError_t launch_paired_cosine<float>(const PairedProblem&, const PairedPlan&, CallStream&);
template cudaError_t launch_paired_cosine<__half>(const PairedProblem&, const PairedPlan&, CallStream&);
template cudaError_t launch_paired_cosine<__nv_bfloat16>(const PairedProblem&, const PairedPlan&, CallStream&);

}  // namespace tokenprune
