// The column pass of the attention ops in float32. Every storage type has a file: they compile side by side.
#include "tokenprune/attention_columns.cuh"

namespace tokenprune {

template cudaError_t launch_attention_columns<float>(const ColumnProblem&, const ColumnPlan&, CallStream&);

}  // namespace tokenprune
