// The compaction kernels. They move bytes, so there is nothing to instantiate.
#include "tokenprune/compaction.cuh"

namespace tokenprune {

cudaError_t launch_gather_compact(const std::vector<CompactTable>& tables, CallStream& stream) {
  for (const CompactTable& table : tables) {
    const cudaError_t status = launch({table.blocks, dim3(kCompactThreads), 0, stream}, gather_compact_kernel, table);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t launch_invert_indices(const InvertProblem& p, const DeviceLimits& limits, CallStream& stream) {
  const int64_t items = p.batch * ceil_div<int64_t>(p.size, kInvertTokens);
  const int64_t blocks = std::min<int64_t>(items, int64_t(limits.sm_count) * 8);
  return launch({blocks, dim3(kInvertThreads), 0, stream}, invert_indices_kernel, p);
}

}  // namespace tokenprune
