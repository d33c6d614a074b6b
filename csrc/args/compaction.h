// Checked arguments of gather_compact, shared by the CPU and the CUDA bindings; ops/gather_compact.py has the same.
#pragma once

#include "checks.h"

namespace tokenprune {

// One tensor to compact, with its dimensions counted from the front.
struct CompactSource {
  Tensor tensor;
  int64_t dim, batch_dim;
};

inline std::string list_entry(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

inline int64_t wrapped_dim(const char* list, size_t i, int64_t dim, int64_t rank) {
  if (dim >= -rank && dim < rank) return dim < 0 ? dim + rank : dim;
  fail("gather_compact", list_entry(list, i).c_str(),
       "lie in [" + std::to_string(-rank) + ", " + std::to_string(rank) + ")", dim);
}

inline std::vector<CompactSource> check_gather_compact(const std::vector<Tensor>& tensors, const Tensor& indices,
                                                       const std::vector<int64_t>& dims,
                                                       const std::optional<std::vector<int64_t>>& batch_dims) {
  const char* op = "gather_compact";
  check_beside(op, "indices", indices, indices, "[B, K]", {-1, -1}, ScalarType::Long);
  const auto check_length = [&](const char* list, size_t length) {
    if (length != tensors.size())
      fail(op, list, "have one entry per tensor (" + std::to_string(tensors.size()) + ")", length);
  };
  check_length("dims", dims.size());
  if (batch_dims) check_length("batch_dims", batch_dims->size());

  const int64_t batch = indices.size(0);
  const std::string device = device_text(indices);
  std::vector<CompactSource> sources;
  sources.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const int64_t rank = t.dim();
    const int64_t dim = wrapped_dim("dims", i, dims[i], rank);
    const int64_t batch_dim = wrapped_dim("batch_dims", i, batch_dims ? (*batch_dims)[i] : 0, rank);
    if (dim == batch_dim)
      fail(op, list_entry("dims", i).c_str(),
           "differ from " + list_entry("batch_dims", i) + " = " + std::to_string(batch_dim), dims[i]);
    if (t.size(batch_dim) != batch)
      fail(op, list_entry("tensors", i).c_str(),
           "have size B = " + std::to_string(batch) + " in dimension " + std::to_string(batch_dim), shape_text(t));
    check_size(op, list_entry("tensors", i).c_str(), t);
    if (device_text(t) != device) fail(op, list_entry("tensors", i).c_str(), "be on " + device, device_text(t));
    check_memory(op, list_entry("tensors", i).c_str(), t);
    sources.push_back({t, dim, batch_dim});
  }
  return sources;
}

}  // namespace tokenprune
