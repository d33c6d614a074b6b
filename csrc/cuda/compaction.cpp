// CUDA bindings of the compaction ops: checks, allocation, one table of all tensors, launch.
#include "tokenprune/compaction.h"

#include "args/compaction.h"
#include "cuda/binding.h"

namespace tokenprune {

namespace {

std::vector<Tensor> gather_compact(const std::vector<Tensor>& tensors, const Tensor& indices,
                                   const std::vector<int64_t>& dims,
                                   const std::optional<std::vector<int64_t>>& batch_dims) {
  const char* op = "gather_compact";
  const std::vector<CompactSource> sources = check_gather_compact(tensors, indices, dims, batch_dims);
  if (sources.empty()) return {};
  const auto tokens = [](const CompactSource& source) { return source.tensor.size(source.dim); };
  const CompactSource& shortest =
      *std::min_element(sources.begin(), sources.end(),
                        [&](const CompactSource& a, const CompactSource& b) { return tokens(a) < tokens(b); });
  check_indices(op, "indices", indices, tokens(shortest));
  const CudaScope cuda(indices);
  const CompactIndices listed{indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1), indices.size(1)};
  CompactPlanner planner(listed);
  std::vector<Tensor> outputs;
  outputs.reserve(sources.size());
  for (const CompactSource& source : sources) {
    const Tensor& t = source.tensor;
    Shape shape(t.sizes().begin(), t.sizes().end());
    shape[source.dim] = listed.kept;
    outputs.push_back(new_empty_of_same_dtype(t, shape));
    planner.add(t.const_data_ptr(), outputs.back().mutable_data_ptr(), t.sizes(), t.strides(), t.element_size(),
                source.dim, source.batch_dim);
  }
  check_launch(op, launch_gather_compact(planner.tables(cuda.limits()), cuda.stream()),
               {{"indices", indices}, {"tensors[0]", tensors[0]}});
  return outputs;
}

Tensor invert_indices(const Tensor& indices, int64_t size) {
  check_invert_indices(indices, size);
  const CudaScope cuda(indices);
  Tensor slots = new_empty(indices, {indices.size(0), size}, ScalarType::Long);
  const InvertProblem problem{indices.const_data_ptr<int64_t>(),
                              indices.stride(0),
                              indices.stride(1),
                              slots.mutable_data_ptr<int64_t>(),
                              indices.size(0),
                              indices.size(1),
                              size};
  check_launch("_invert_indices", launch_invert_indices(problem, cuda.limits(), cuda.stream()), {{"indices", indices}});
  return slots;
}

}  // namespace

TOKENPRUNE_CUDA_OPS(m) {
  TOKENPRUNE_IMPL(m, "gather_compact", gather_compact);
  TOKENPRUNE_IMPL(m, "_invert_indices", invert_indices);
}

}  // namespace tokenprune
