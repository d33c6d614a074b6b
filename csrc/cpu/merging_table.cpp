// Chooses the table of merging kernels for this machine.
#include "cpu/capability.h"
#include "cpu/simd/merging.h"

namespace tokenprune {

TOKENPRUNE_TABLE(MergingTable, merging)

const MergingTable& merging_table() { return TOKENPRUNE_CHOOSE(merging); }

}  // namespace tokenprune
