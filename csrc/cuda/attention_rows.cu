// The row pass of the attention ops and the inverse norms, for every storage type.
#include "tokenprune/attention_norms.cuh"
#include "tokenprune/attention_rows.cuh"

namespace tokenprune {

template cudaError_t launch_attention_norms<float>(const AttentionProblem&, CallStream&);
template cudaError_t launch_attention_norms<__half>(const AttentionProblem&, CallStream&);
template cudaError_t launch_attention_norms<__nv_bfloat16>(const AttentionProblem&, CallStream&);

template cudaError_t launch_attention_rows<float>(const AttentionProblem&, const AttentionRowPlan&,
                                                  const AttentionRowOutputs&, CallStream&);
template cudaError_t launch_attention_rows<__half>(const AttentionProblem&, const AttentionRowPlan&,
                                                   const AttentionRowOutputs&, CallStream&);
template cudaError_t launch_attention_rows<__nv_bfloat16>(const AttentionProblem&, const AttentionRowPlan&,
                                                          const AttentionRowOutputs&, CallStream&);

}  // namespace tokenprune
