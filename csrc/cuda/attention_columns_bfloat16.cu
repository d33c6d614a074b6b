// The column pass of the attention ops in bfloat16. Every storage type has a file: they compile side by side.
#include "tokenprune/attention_columns.cuh"

namespace tokenprune {

template cudaError_t launch_attention_columns<__nv_bfloat16>(const ColumnProblem&, const ColumnPlan&, CallStream&);

}  // namespace tokenprune
