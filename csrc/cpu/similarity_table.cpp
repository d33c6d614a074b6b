// Chooses the table of cosine kernels for this machine.
#include "cpu/capability.h"
#include "cpu/simd/similarity.h"

namespace tokenprune {

namespace baseline {
extern const SimilarityTable similarity;
}
#if defined(__x86_64__)
namespace avx2 {
extern const SimilarityTable similarity;
}
namespace avx512 {
extern const SimilarityTable similarity;
}

const SimilarityTable& similarity_table() {
  return choose(baseline::similarity, &avx2::similarity, &avx512::similarity);
}
#else
const SimilarityTable& similarity_table() { return baseline::similarity; }
#endif

}  // namespace tokenprune
