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

// TOKENPRUNE_TABLE(RowKernels<float>, rows_f32) declares a table that a file in cpu/simd defines once per capability,
// in the namespaces of that name; TOKENPRUNE_CHOOSE(rows_f32) is the one for this machine.
#if defined(__x86_64__)
#define TOKENPRUNE_TABLE(type, name) \
  namespace baseline {               \
  extern const type name;            \
  }                                  \
  namespace avx2 {                   \
  extern const type name;            \
  }                                  \
  namespace avx512 {                 \
  extern const type name;            \
  }
#define TOKENPRUNE_CHOOSE(name) choose(baseline::name, &avx2::name, &avx512::name)
#else
#define TOKENPRUNE_TABLE(type, name) \
  namespace baseline {               \
  extern const type name;            \
  }
#define TOKENPRUNE_CHOOSE(name) baseline::name
#endif

}  // namespace tokenprune
