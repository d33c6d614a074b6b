// Planted faults, one for each tool of compute-sanitizer: a tool that does not find its own proves nothing by silence.
#include <cstdio>
#include <cstring>

__global__ void write_out_of_bounds(float* x) { x[1024 + threadIdx.x] = 1; }

__global__ void race(float* x) {
  __shared__ float exchange[64];
  exchange[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = exchange[(threadIdx.x + 32) % 64];  // another warp's, without a barrier
}

__global__ void read_uninitialised(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x] + 1; }

__global__ void diverge(float* x) {
  if (threadIdx.x < 40) {
    __syncthreads();
    x[threadIdx.x] = 1;
  }
}

int main(int count, char** words) {
  const char* fault = count > 1 ? words[1] : "";
  float *x, *y;
  if (cudaMalloc(&x, 64 * sizeof(float)) != cudaSuccess || cudaMalloc(&y, 64 * sizeof(float)) != cudaSuccess) return 3;
  if (!std::strcmp(fault, "memcheck")) write_out_of_bounds<<<1, 64>>>(x);
  if (!std::strcmp(fault, "racecheck")) cudaMemset(x, 0, 64 * sizeof(float)), race<<<1, 64>>>(x);
  if (!std::strcmp(fault, "initcheck")) read_uninitialised<<<1, 64>>>(x, y);
  if (!std::strcmp(fault, "synccheck")) diverge<<<1, 64>>>(x);
  std::printf("%s: %s\n", fault, cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
