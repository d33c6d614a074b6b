// What the planners must know and no attribute of the device tells: which architecture the code that runs here was
// compiled for (where only PTX of an older one fits the device, the kernels have no clusters although the device does),
// and the blocks of the largest cluster (which a device that is cut into small instances has fewer of).
#include "tokenprune/device.cuh"

namespace tokenprune {

namespace {

__global__ void probe_kernel() {}

}  // namespace

cudaError_t compiled_architecture(int* architecture) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (status == cudaSuccess) *architecture = attributes.ptxVersion;
  return status;
}

cudaError_t largest_cluster(int* blocks) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(1024);
  return cudaOccupancyMaxPotentialClusterSize(blocks, probe_kernel, &config);
}

}  // namespace tokenprune
