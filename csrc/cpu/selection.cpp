// CPU kernels of the selection ops.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "args/selection.h"
#include "parallel.h"

namespace tokenprune {

namespace {

std::tuple<Tensor, Tensor> mask_to_indices(const Tensor& mask_in, int64_t capacity) {
  check_mask_to_indices(mask_in, capacity);
  const Tensor mask = with_contiguous_rows(mask_in);
  const int64_t batch = mask.size(0), n = mask.size(1), stride = mask.stride(0);
  Tensor indices = new_empty(mask, {batch, capacity}, ScalarType::Long);
  Tensor counts = new_empty(mask, {batch}, ScalarType::Long);
  const bool* flags = mask.const_data_ptr<bool>();
  int64_t* out = indices.mutable_data_ptr<int64_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  parallel_for(batch, 1 + 16384 / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      int64_t found = 0;
      for (int64_t i = 0; i < n && found < capacity; ++i)
        if (flags[b * stride + i]) out[b * capacity + found++] = i;
      count[b] = found;
      for (int64_t i = found; i < capacity; ++i) out[b * capacity + i] = -1;
    }
  });
  return {indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("mask_to_indices", TORCH_BOX(&mask_to_indices)); }

}  // namespace tokenprune
