// The stream that a call launches to.
#pragma once

#include <cuda_runtime.h>

namespace tokenprune {

// The first launch of a call waits for all that is in front of it in the stream. Those behind it are dependent where the
// device lets launches overlap (Launch, device.cuh).
struct CallStream {
  cudaStream_t handle;
  bool overlap;        // compute capability 9.0
  bool begun = false;  // has the call launched anything?
};

}  // namespace tokenprune
