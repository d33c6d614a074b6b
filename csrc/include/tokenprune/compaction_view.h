// How gather_compact sees a tensor, on every backend: rows of contiguous bytes, in the order of the output.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tokenprune {

// One dimension of an output. Strides are the input's, in bytes; index_stride says how the slot of `indices` moves
// along this dimension: nonzero for the token and the batch dimension only. A token's own offset in the input comes from
// its index, so the token dimension has stride 0 here.
struct CompactLoop {
  int64_t size, stride, index_stride;
  friend bool operator==(const CompactLoop& a, const CompactLoop& b) {
    return a.size == b.size && a.stride == b.stride && a.index_stride == b.index_stride;
  }
};

struct CompactIndices {
  const int64_t* data;  // [batch, kept]
  int64_t batch_stride, token_stride;
  int64_t kept;
};

struct CompactView {
  int64_t run;           // contiguous bytes in a row
  int64_t rows;          // of the output
  int64_t token_stride;  // bytes from one token of the input to the next
  size_t first_loop, loops;
  bool token_innermost;  // the first loop is the one over the kept tokens
};

// Appends the loops of a tensor to `loops`, the innermost one first. Dimensions behind the token dimension that are
// contiguous in the input make up the run; neighbouring dimensions that one stride walks become one loop.
template <class Sizes, class Strides>
CompactView make_compact_view(const Sizes& sizes, const Strides& strides, int64_t element, int64_t dim,
                              int64_t batch_dim, const CompactIndices& indices, std::vector<CompactLoop>& loops) {
  CompactView view{element, 1, sizes[dim] > 1 ? strides[dim] * element : 0, loops.size(), 0, false};
  bool in_run = true, plain_before = false;
  for (auto d = static_cast<int64_t>(sizes.size()); d-- > 0;) {
    // The stride of a dimension that is never walked may be anything, even too large for a number of bytes.
    const int64_t size = sizes[d], stride = size > 1 ? strides[d] * element : 0;
    const bool token = d == dim, batch = d == batch_dim;
    if (size == 1 && !token) continue;
    in_run = in_run && !token && !batch && stride == view.run;
    if (in_run) {
      view.run *= size;
      continue;
    }
    const bool plain = !token && !batch;
    view.rows *= token ? indices.kept : size;
    if (plain && plain_before && stride == loops.back().size * loops.back().stride) {
      loops.back().size *= size;
    } else {
      view.token_innermost = view.token_innermost || (token && loops.size() == view.first_loop);
      loops.push_back({token ? indices.kept : size, token ? 0 : stride,
                       token ? indices.token_stride : (batch ? indices.batch_stride : 0)});
    }
    plain_before = plain;
  }
  view.loops = loops.size() - view.first_loop;
  if (view.run == 0) view.rows = 0;
  return view;
}

}  // namespace tokenprune
