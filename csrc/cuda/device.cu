// Which architecture the code that runs here was compiled for: where only PTX of an older one fits the device, the
// kernels have no clusters although the device does, and the planners must know.
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

}  // namespace tokenprune
