// The column pass of the attention ops with query_reduction none, in every storage type: one instantiation of each.
#include "tokenprune/attention_columns.cuh"

namespace tokenprune {

template cudaError_t launch_attention_every_row<float>(const ColumnProblem&, const ColumnPlan&, CallStream&);
template cudaError_t launch_attention_every_row<__half>(const ColumnProblem&, const ColumnPlan&, CallStream&);
template cudaError_t launch_attention_every_row<__nv_bfloat16>(const ColumnProblem&, const ColumnPlan&, CallStream&);

}  // namespace tokenprune
