// Chooses the table of cosine kernels for this machine.
#include "cpu/capability.h"
#include "cpu/simd/similarity.h"

namespace tokenprune {

TOKENPRUNE_TABLE(SimilarityTable, similarity)

const SimilarityTable& similarity_table() { return TOKENPRUNE_CHOOSE(similarity); }

}  // namespace tokenprune
