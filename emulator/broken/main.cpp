// Runs kernels in a process of its own, for AddressSanitizer: main NAME VARIANT [NAME VARIANT ...]. Every kind of
// memory holds one float per thread, so that variant 1 is one float too far.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "broken/kernels.h"

int main(int argc, char** argv) {
  constexpr unsigned kThreads = 32;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::unique_ptr<float[]> in(new float[kThreads]()), out(new float[kThreads]());
    try {
      const Arguments arguments{in.get(), out.get(), std::atoi(argv[i + 1])};
      const cudaError_t status = run_kernel(argv[i], 1, kThreads, kThreads * sizeof(float), 1, false, arguments);
      std::printf("%s\n", cudaGetErrorName(status));
    } catch (const tokenprune::emulator::KernelError& error) {
      std::printf("%s\n", error.what());
    }
  }
  return 0;
}
