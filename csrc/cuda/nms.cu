// The kernels of spatial_semantic_nms for every storage type of the features.
#include "tokenprune/nms.cuh"

namespace tokenprune {

template cudaError_t launch_spatial_semantic_nms<float>(const NmsProblem&, const NmsPlan&, CallStream&);
template cudaError_t launch_spatial_semantic_nms<__half>(const NmsProblem&, const NmsPlan&, CallStream&);
template cudaError_t launch_spatial_semantic_nms<__nv_bfloat16>(const NmsProblem&, const NmsPlan&, CallStream&);

}  // namespace tokenprune
