// gather_compact on the CPU: copies of contiguous runs, all tensors in one parallel loop; and the inverse of an index
// list, with which the same gather computes the gradient.
#include "args/compaction.h"

#include <algorithm>
#include <cstring>

#include "op.h"
#include "parallel.h"
#include "tokenprune/compaction_view.h"

namespace tokenprune {

namespace {

constexpr int64_t kMaxRank = 64;

// One tensor as rows of bytes. Consecutive tokens of the innermost loop are `adjacent` when they lie next to each
// other.
struct Plan {
  const char* from;
  char* to;
  CompactView view;
  bool adjacent;
};

Plan make_plan(const CompactSource& source, const Tensor& output, const CompactIndices& indices,
               std::vector<CompactLoop>& loops) {
  const Tensor& t = source.tensor;
  const CompactView view =
      make_compact_view(t.sizes(), t.strides(), t.element_size(), source.dim, source.batch_dim, indices, loops);
  return {static_cast<const char*>(t.const_data_ptr()), static_cast<char*>(output.mutable_data_ptr()), view,
          view.token_innermost && view.token_stride == view.run};
}

// Elements begin..end of an innermost loop; `bytes` is the run where it is known at compile time, else 0.
template <int bytes>
void copy_line(const Plan& plan, const CompactLoop& line, const char* from, const int64_t* index, int64_t begin,
               int64_t end, char* to) {
  const int64_t run = bytes ? bytes : plan.view.run;
  for (int64_t j = begin; j < end;) {
    const int64_t token = index[j * line.index_stride];
    int64_t together = 1;
    if constexpr (bytes == 0) {
      if (plan.adjacent && token >= 0)
        while (j + together < end && index[(j + together) * line.index_stride] == token + together) ++together;
    }
    const int64_t length = bytes ? bytes : together * run;
    if (token < 0)
      std::memset(to, 0, length);
    else
      std::memcpy(to, from + j * line.stride + token * plan.view.token_stride, length);
    to += length;
    j += together;
  }
}

using CopyLine = void (*)(const Plan&, const CompactLoop&, const char*, const int64_t*, int64_t, int64_t, char*);

CopyLine line_copier(int64_t run) {
  switch (run) {
    case 1:
      return copy_line<1>;
    case 2:
      return copy_line<2>;
    case 4:
      return copy_line<4>;
    case 8:
      return copy_line<8>;
    case 16:
      return copy_line<16>;
    default:
      return copy_line<0>;
  }
}

void copy_rows(const Plan& plan, const CompactLoop* loops, const int64_t* indices, int64_t begin, int64_t end) {
  const CopyLine copy = line_copier(plan.view.run);
  const int64_t length = loops[0].size;
  const auto outer = static_cast<int64_t>(plan.view.loops);
  int64_t at[kMaxRank];
  int64_t offset = 0, slot = 0;
  int64_t line = begin / length;
  for (int64_t l = 1; l < outer; ++l) {
    at[l] = line % loops[l].size;
    line /= loops[l].size;
    offset += at[l] * loops[l].stride;
    slot += at[l] * loops[l].index_stride;
  }
  for (int64_t row = begin; row < end;) {
    const int64_t first = row % length, count = std::min(length - first, end - row);
    copy(plan, loops[0], plan.from + offset, indices + slot, first, first + count, plan.to + row * plan.view.run);
    row += count;
    for (int64_t l = 1; l < outer; ++l) {
      offset += loops[l].stride;
      slot += loops[l].index_stride;
      if (++at[l] < loops[l].size) break;
      offset -= loops[l].size * loops[l].stride;
      slot -= loops[l].size * loops[l].index_stride;
      at[l] = 0;
    }
  }
}

// Raises before anything is copied: every index must be a token of every tensor. After the outputs were allocated,
// which fails at once when there are more indices than anyone could read.
void check_values(const std::vector<CompactSource>& sources, const Tensor& indices, const CompactIndices& rows) {
  int64_t low = -1, high = -1;
  const int64_t batch = rows.kept > 0 ? indices.size(0) : 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < rows.kept; ++k) {
      const int64_t value = rows.data[b * rows.batch_stride + k * rows.token_stride];
      low = std::min(low, value);
      high = std::max(high, value);
    }
  for (const CompactSource& source : sources) {
    const int64_t tokens = source.tensor.size(source.dim);
    const int64_t worst = low < -1 ? low : high;
    check_index_values("gather_compact", "indices", &worst, 1, tokens);
  }
}

std::vector<Tensor> gather_compact(const std::vector<Tensor>& tensors, const Tensor& indices,
                                   const std::vector<int64_t>& dims,
                                   const std::optional<std::vector<int64_t>>& batch_dims) {
  const std::vector<CompactSource> sources = check_gather_compact(tensors, indices, dims, batch_dims);
  const int64_t kept = indices.size(1);
  const CompactIndices rows{indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1), kept};

  std::vector<Tensor> outputs;
  std::vector<CompactLoop> loops;
  std::vector<Plan> plans;
  std::vector<int64_t> ends;  // where the work of each plan ends: bytes, and a little for each row
  constexpr int64_t kRowCost = 16, kWorthAThread = 512 << 10;
  int64_t work = 0;
  outputs.reserve(tensors.size());
  plans.reserve(tensors.size());
  ends.reserve(tensors.size());
  loops.reserve(4 * tensors.size());
  for (const CompactSource& source : sources) {
    const auto sizes = source.tensor.sizes();
    if (source.tensor.dim() > kMaxRank)
      fail("gather_compact", "tensors", "have at most 64 dimensions", source.tensor.dim());
    Shape shape(sizes.begin(), sizes.end());
    shape[source.dim] = kept;
    outputs.push_back(new_empty_of_same_dtype(source.tensor, shape));
    plans.push_back(make_plan(source, outputs.back(), rows, loops));
    work += plans.back().view.rows * (plans.back().view.run + kRowCost);
    ends.push_back(work);
  }

  check_values(sources, indices, rows);

  // A row belongs to the piece of work in which it starts.
  parallel_for(work, kWorthAThread, [&](int64_t begin, int64_t end) {
    for (size_t p = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); p < plans.size(); ++p) {
      const Plan& plan = plans[p];
      const int64_t cost = plan.view.run + kRowCost, start = ends[p] - plan.view.rows * cost;
      if (start >= end) break;
      const int64_t first = begin <= start ? 0 : (begin - start + cost - 1) / cost;
      const int64_t last = std::min(plan.view.rows, (end - start + cost - 1) / cost);
      if (first < last) copy_rows(plan, &loops[plan.view.first_loop], rows.data, first, last);
    }
  });
  return outputs;
}

Tensor invert_indices(const Tensor& indices, int64_t size) {
  check_invert_indices(indices, size);
  const int64_t batch = indices.size(0), kept = indices.size(1);
  const int64_t* listed = indices.const_data_ptr<int64_t>();
  Tensor slots = new_empty(indices, {batch, size}, ScalarType::Long);
  auto* slot = slots.mutable_data_ptr<int64_t>();
  std::fill(slot, slot + batch * size, int64_t(-1));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t n = 0; n < kept; ++n) {
      const int64_t token = listed[b * indices.stride(0) + n * indices.stride(1)];
      if (token >= 0 && token < size) slot[b * size + token] = n;
    }
  return slots;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) {
  TOKENPRUNE_IMPL(m, "gather_compact", gather_compact);
  TOKENPRUNE_IMPL(m, "_invert_indices", invert_indices);
}

}  // namespace tokenprune
