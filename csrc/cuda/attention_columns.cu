// The combination of row parts, of which there is one for all storage types of the column pass.
#include "tokenprune/attention_column_rows.cuh"

namespace tokenprune {

cudaError_t launch_attention_columns_combine(const ColumnProblem& c, const ColumnPlan& plan, CallStream& stream) {
  const int64_t blocks = c.attention.batch * ceil_div<int64_t>(c.out_heads() * c.columns, kCombineThreads);
  return launch({blocks, dim3(kCombineThreads), 0, stream}, attention_columns_combine_kernel<kCombineThreads>, c, plan);
}

}  // namespace tokenprune
