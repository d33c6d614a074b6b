#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

namespace tokenprune {

namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512"};

Capability detect() {
  int best = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  const char* wish = std::getenv("TOKENPRUNE_CPU_CAPABILITY");
  for (int i = 0; wish != nullptr && i < best; ++i)
    if (std::strcmp(wish, kNames[i]) == 0) best = i;
  return static_cast<Capability>(best);
}

}  // namespace

Capability capability() {
  static const Capability chosen = detect();
  return chosen;
}

const char* capability_name() { return kNames[static_cast<int>(capability())]; }

}  // namespace tokenprune
