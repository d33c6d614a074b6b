// Which instruction set the vectorised CPU kernels use: the best one that the machine has, chosen once.
#pragma once

namespace tokenprune {

enum class Capability { kBaseline, kAvx2, kAvx512 };

// TOKENPRUNE_CPU_CAPABILITY=baseline|avx2|avx512 lowers the choice (never raises it above what the machine has).
Capability capability();
const char* capability_name();

// One of three tables of kernels; the files in cpu/simd are compiled once per capability.
template <class Table>
const Table& choose(const Table& baseline, const Table* avx2, const Table* avx512) {
  if (capability() == Capability::kAvx512 && avx512 != nullptr) return *avx512;
  if (capability() >= Capability::kAvx2 && avx2 != nullptr) return *avx2;
  return baseline;
}

}  // namespace tokenprune
