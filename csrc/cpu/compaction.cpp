// gather_compact on the CPU: copies of contiguous runs, all tensors in one parallel loop.
#include "args/compaction.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace tokenprune {

namespace {

constexpr int64_t kMaxRank = 64;

// One dimension of an output, walked in the output's order. Strides are the input's, in bytes; index_stride says how
// the position in `indices` moves along this dimension: nonzero for the token and the batch dimension only.
struct Loop {
  int64_t size, stride, index_stride;
};

// One tensor as rows: contiguous runs of bytes, in the order of the output.
struct Plan {
  const char* from;
  char* to;
  int64_t run;           // bytes in a row
  int64_t token_stride;  // bytes from one token to the next
  bool adjacent;         // consecutive tokens of the innermost loop lie next to each other
  size_t first_loop, loops;
  int64_t rows;
};

struct IndexRows {
  const int64_t* data;
  int64_t batch_stride, token_stride;
};

// The innermost loop comes first. Dimensions behind the token dimension that are contiguous in the input make up the
// run; neighbouring dimensions that can be walked with one stride become one loop.
Plan make_plan(const CompactSource& source, const Tensor& output, const IndexRows& indices, int64_t kept,
               std::vector<Loop>& loops) {
  const Tensor& t = source.tensor;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t element = t.element_size();
  Plan plan{static_cast<const char*>(t.const_data_ptr()),
            static_cast<char*>(output.mutable_data_ptr()),
            element,
            sizes[source.dim] > 1 ? strides[source.dim] * element : 0,
            false,
            loops.size(),
            0,
            1};
  bool in_run = true, plain_before = false;
  for (int64_t d = t.dim(); d-- > 0;) {
    // The stride of a dimension that is never walked may be anything, even too large for a number of bytes.
    const int64_t size = sizes[d], stride = size > 1 ? strides[d] * element : 0;
    const bool token = d == source.dim, batch = d == source.batch_dim;
    if (size == 1 && !token) continue;
    in_run = in_run && !token && !batch && stride == plan.run;
    if (in_run) {
      plan.run *= size;
      continue;
    }
    const bool plain = !token && !batch;
    plan.rows *= token ? kept : size;
    if (plain && plain_before && stride == loops.back().size * loops.back().stride) {
      loops.back().size *= size;
    } else {
      loops.push_back(
          {token ? kept : size, token ? 0 : stride, token ? indices.token_stride : (batch ? indices.batch_stride : 0)});
      plan.adjacent = plan.adjacent || (token && loops.size() == plan.first_loop + 1 && plan.token_stride == plan.run);
    }
    plain_before = plain;
  }
  plan.loops = loops.size() - plan.first_loop;
  if (plan.run == 0) plan.rows = 0;
  return plan;
}

// Elements begin..end of an innermost loop; `bytes` is the run where it is known at compile time, else 0.
template <int bytes>
void copy_line(const Plan& plan, const Loop& line, const char* from, const int64_t* index, int64_t begin, int64_t end,
               char* to) {
  const int64_t run = bytes ? bytes : plan.run;
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
      std::memcpy(to, from + j * line.stride + token * plan.token_stride, length);
    to += length;
    j += together;
  }
}

using CopyLine = void (*)(const Plan&, const Loop&, const char*, const int64_t*, int64_t, int64_t, char*);

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

void copy_rows(const Plan& plan, const Loop* loops, const int64_t* indices, int64_t begin, int64_t end) {
  const CopyLine copy = line_copier(plan.run);
  const int64_t length = loops[0].size;
  const auto outer = static_cast<int64_t>(plan.loops);
  int64_t at[kMaxRank];
  int64_t offset = 0, place = 0;
  int64_t line = begin / length;
  for (int64_t l = 1; l < outer; ++l) {
    at[l] = line % loops[l].size;
    line /= loops[l].size;
    offset += at[l] * loops[l].stride;
    place += at[l] * loops[l].index_stride;
  }
  for (int64_t row = begin; row < end;) {
    const int64_t first = row % length, count = std::min(length - first, end - row);
    copy(plan, loops[0], plan.from + offset, indices + place, first, first + count, plan.to + row * plan.run);
    row += count;
    for (int64_t l = 1; l < outer; ++l) {
      offset += loops[l].stride;
      place += loops[l].index_stride;
      if (++at[l] < loops[l].size) break;
      offset -= loops[l].size * loops[l].stride;
      place -= loops[l].size * loops[l].index_stride;
      at[l] = 0;
    }
  }
}

// Raises before anything is copied: every index must be a token of every tensor.
void check_values(const std::vector<CompactSource>& sources, const Tensor& indices, const IndexRows& rows) {
  int64_t low = -1, high = -1;
  for (int64_t b = 0; b < indices.size(0); ++b)
    for (int64_t k = 0; k < indices.size(1); ++k) {
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
  const IndexRows rows{indices.const_data_ptr<int64_t>(), indices.stride(0), indices.stride(1)};
  check_values(sources, indices, rows);

  std::vector<Tensor> outputs;
  std::vector<Loop> loops;
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
    plans.push_back(make_plan(source, outputs.back(), rows, kept, loops));
    work += plans.back().rows * (plans.back().run + kRowCost);
    ends.push_back(work);
  }

  // A row belongs to the piece of work in which it starts.
  parallel_for(work, kWorthAThread, [&](int64_t begin, int64_t end) {
    for (size_t p = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); p < plans.size(); ++p) {
      const Plan& plan = plans[p];
      const int64_t cost = plan.run + kRowCost, start = ends[p] - plan.rows * cost;
      if (start >= end) break;
      const int64_t first = begin <= start ? 0 : (begin - start + cost - 1) / cost;
      const int64_t last = std::min(plan.rows, (end - start + cost - 1) / cost);
      if (first < last) copy_rows(plan, &loops[plan.first_loop], rows.data, first, last);
    }
  });
  return outputs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tokenprune, CPU, m) { m.impl("gather_compact", TORCH_BOX(&gather_compact)); }

}  // namespace tokenprune
