// Launches that start before the one in front of them has ended.
#pragma once

#include "broken/kernels.h"
#include "tokenprune/ptx.cuh"

namespace broken {

using namespace tokenprune;

// out = [sums, doubles, addends]: sums = in + addends.
__global__ void lead(const Arguments p) {
  let_next_launch_start();
  auto* out = static_cast<float*>(p.out) + threadIdx.x;
  out[0] = static_cast<const float*>(p.in)[threadIdx.x] + out[2 * kWarp];
}

// doubles += 2 sums, addends = 7. 0: right; 1: does not wait; 2: reads before it waits; 3: writes before it waits;
// 4: one thread does not wait.
__global__ void follow(const Arguments p) {
  let_next_launch_start();
  auto* out = static_cast<float*>(p.out) + threadIdx.x;
  const float early = out[0];
  if (p.variant == 3) out[2 * kWarp] = 7;
  if (p.variant != 1 && (p.variant != 4 || threadIdx.x > 0)) wait_for_launch_before();
  out[kWarp] += 2 * (p.variant == 2 ? early : out[0]);
  out[2 * kWarp] = 7;
}

}  // namespace broken
