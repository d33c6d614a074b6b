// The column pass of the attention ops, for every storage type.
#include "tokenprune/attention_columns.cuh"

namespace tokenprune {

template cudaError_t launch_attention_columns<float>(const ColumnProblem&, const ColumnPlan&, cudaStream_t);
template cudaError_t launch_attention_columns<__half>(const ColumnProblem&, const ColumnPlan&, cudaStream_t);
template cudaError_t launch_attention_columns<__nv_bfloat16>(const ColumnProblem&, const ColumnPlan&, cudaStream_t);

}  // namespace tokenprune
