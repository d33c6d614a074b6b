// Small kernels for the tests of the emulator itself: right ones whose results are known, and ones with a deliberate
// mistake that the emulator has to find.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

struct Arguments {
  const void* in;
  void* out;
  int variant;  // what it means differs from kernel to kernel
};

std::vector<std::string> kernel_names();
// Launches a kernel by name. Throws KernelError for what the emulator finds, returns the status of a refused launch.
cudaError_t run_kernel(const std::string& name, int64_t blocks, dim3 block, size_t shared, unsigned cluster,
                       bool cooperative, const Arguments& arguments);
// One launch of `lead` and, dependent, so many of `follow`.
cudaError_t run_dependent(unsigned followers, const Arguments& arguments);
