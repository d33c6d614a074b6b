// gather_compact as the host sees it: the table of tensors that a launch gets by value, and its planner.
//
// The table travels as the kernel's parameter, so that a call needs no host-to-device copy and can be captured. It is
// kept within the 4 KB that every driver takes (the 32,764 bytes of CUDA 12.1 need a driver of that generation and cost
// every launch their transfer): tensors of equal geometry, such as the caches of all layers, share one entry and add 16
// bytes each.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tokenprune/call_stream.h"
#include "tokenprune/compaction_view.h"
#include "tokenprune/limits.h"
#include "tokenprune/macros.h"

namespace tokenprune {

// Division of 32-bit numbers below 2^31 by a number that stays the same: a multiplication and a shift.
struct Divisor {
  uint32_t value, multiplier, shift;
};

inline Divisor make_divisor(uint32_t value) {
  uint32_t shift = 0;
  while ((uint64_t(1) << shift) < value) ++shift;
  return {value, static_cast<uint32_t>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value)) / value + 1), shift};
}

TOKENPRUNE_HD uint32_t divide(uint32_t n, const Divisor& d) {
  return (static_cast<uint32_t>((uint64_t(n) * d.multiplier) >> 32) + n) >> d.shift;
}

constexpr int kCompactThreads = 256, kCompactUnroll = 4;
constexpr int64_t kCompactVectors = (int64_t(1) << 31) - 1;  // in one piece of work: indices within it have 32 bits

// Tensors of equal sizes, strides and alignment.
struct CompactGroup {
  int64_t tokens, token_stride;  // of the inputs; the stride in bytes
  int64_t index_offset;          // of the first row in `indices`
  uint32_t vectors;              // in each output
  uint32_t first_block;
  Divisor row;     // vectors in a row
  Divisor blocks;  // of one tensor
  uint8_t width;   // bytes of a vector: 16, 8, 4, 2 or 1
  uint8_t first_loop, loops;
  uint8_t first_tensor;
};

struct CompactStep {
  int64_t stride, index_stride;
  Divisor size;
};

struct CompactPointers {
  const char* from;
  char* to;
};

struct CompactTable {
  // A piece has at most 2^31 rows, hence at most 31 loops of two or more and one over a single token.
  static constexpr int kGroups = 16, kLoops = 40, kTensors = 108;
  const int64_t* indices;
  uint32_t blocks;
  uint16_t vectors_per_block, groups;
  CompactGroup group[kGroups];
  CompactStep loop[kLoops];
  CompactPointers tensor[kTensors];
};
static_assert(sizeof(CompactTable) <= 4096, "kernel parameters of any driver");

// Collects tensors and turns them into tables.
class CompactPlanner {
 public:
  explicit CompactPlanner(const CompactIndices& indices, int64_t max_vectors = kCompactVectors)
      : indices_(indices), max_vectors_(max_vectors) {}

  // `to` is contiguous, of the same sizes with `kept` in place of `dim`.
  template <class Sizes, class Strides>
  void add(const void* from, void* to, const Sizes& sizes, const Strides& strides, int64_t element, int64_t dim,
           int64_t batch_dim) {
    loops_.clear();
    const CompactView view = make_compact_view(sizes, strides, element, dim, batch_dim, indices_, loops_);
    if (view.rows == 0) return;
    // A vector has to fit every address that is a sum of these.
    uint64_t addresses = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | 16;
    addresses |= static_cast<uint64_t>(view.run) | static_cast<uint64_t>(view.token_stride);
    for (const CompactLoop& loop : loops_) addresses |= static_cast<uint64_t>(loop.stride);
    width_ = static_cast<int64_t>(addresses & (~addresses + 1));
    tokens_ = sizes[dim];
    token_stride_ = view.token_stride;
    add_piece({static_cast<const char*>(from), static_cast<char*>(to)}, 0, view.run, loops_.size());
  }

  std::vector<CompactTable> tables(const DeviceLimits& limits) const;

 private:
  struct Kind {
    int64_t tokens, token_stride, index_offset, width, run;
    std::vector<CompactLoop> loops;
    std::vector<CompactPointers> tensors;
    int64_t vectors() const {
      int64_t count = run / width;
      for (const CompactLoop& loop : loops) count *= loop.size;
      return count;
    }
  };

  // The outermost `loops` loops of the current tensor; pieces that are too large are cut along the outermost one, and a
  // row along its bytes.
  void add_piece(CompactPointers at, int64_t index_offset, int64_t run, size_t loops) {
    int64_t inner = run / width_;
    for (size_t l = 0; l + 1 < loops; ++l) inner *= loops_[l].size;
    if (loops == 0) {
      for (int64_t begin = 0; begin < run; begin += max_vectors_ * width_)
        append({at.from + begin, at.to + begin}, index_offset, std::min(run - begin, max_vectors_ * width_), 0);
      return;
    }
    CompactLoop& outer = loops_[loops - 1];
    const CompactLoop whole = outer;
    if (whole.size <= max_vectors_ / inner) return append(at, index_offset, run, loops);
    const int64_t part = std::max<int64_t>(1, max_vectors_ / inner);
    for (int64_t begin = 0; begin < whole.size; begin += part) {
      outer.size = std::min(part, whole.size - begin);
      add_piece({at.from + begin * whole.stride, at.to + begin * inner * width_},
                index_offset + begin * whole.index_stride, run, outer.size == 1 ? loops - 1 : loops);
    }
    outer = whole;
  }

  void append(CompactPointers at, int64_t index_offset, int64_t run, size_t loops) {
    constexpr size_t kLookBack = 16;
    for (size_t k = kinds_.size(); k-- > 0 && kinds_.size() - k <= kLookBack;) {
      Kind& kind = kinds_[k];
      if (kind.run == run && kind.width == width_ && kind.tokens == tokens_ && kind.token_stride == token_stride_ &&
          kind.index_offset == index_offset && kind.loops.size() == loops &&
          std::equal(kind.loops.begin(), kind.loops.end(), loops_.begin())) {
        kind.tensors.push_back(at);
        return;
      }
    }
    const auto end = loops_.begin() + static_cast<ptrdiff_t>(loops);
    kinds_.push_back({tokens_, token_stride_, index_offset, width_, run, {loops_.begin(), end}, {at}});
  }

  static void number_blocks(CompactTable& table, const DeviceLimits& limits);

  CompactIndices indices_;
  int64_t max_vectors_;
  std::vector<Kind> kinds_;
  // Of the tensor that is being added.
  std::vector<CompactLoop> loops_;
  int64_t width_ = 0, tokens_ = 0, token_stride_ = 0;
};

inline std::vector<CompactTable> CompactPlanner::tables(const DeviceLimits& limits) const {
  std::vector<CompactTable> tables;
  int loops = 0, tensors = 0;
  for (const Kind& kind : kinds_) {
    const auto own_loops = static_cast<int>(kind.loops.size());
    for (size_t next = 0; next < kind.tensors.size();) {
      if (tables.empty() || tables.back().groups == CompactTable::kGroups || tensors == CompactTable::kTensors ||
          loops + own_loops > CompactTable::kLoops) {
        tables.push_back({});
        tables.back().indices = indices_.data;
        loops = tensors = 0;
      }
      CompactTable& table = tables.back();
      const size_t count = std::min<size_t>(kind.tensors.size() - next, CompactTable::kTensors - tensors);
      const Divisor row = make_divisor(static_cast<uint32_t>(kind.run / kind.width));
      const Divisor tensor_count = {static_cast<uint32_t>(count), 0, 0};  // of blocks, from number_blocks on
      table.group[table.groups++] = {kind.tokens,
                                     kind.token_stride,
                                     kind.index_offset,
                                     static_cast<uint32_t>(kind.vectors()),
                                     0,
                                     row,
                                     tensor_count,
                                     static_cast<uint8_t>(kind.width),
                                     static_cast<uint8_t>(loops),
                                     static_cast<uint8_t>(own_loops),
                                     static_cast<uint8_t>(tensors)};
      for (const CompactLoop& loop : kind.loops)
        table.loop[loops++] = {loop.stride, loop.index_stride, make_divisor(static_cast<uint32_t>(loop.size))};
      for (size_t i = 0; i < count; ++i) table.tensor[tensors++] = kind.tensors[next++];
    }
  }
  for (CompactTable& table : tables) number_blocks(table, limits);
  return tables;
}

// Four vectors per thread keep the memory busy; where that leaves multiprocessors without a block, fewer.
inline void CompactPlanner::number_blocks(CompactTable& table, const DeviceLimits& limits) {
  const auto blocks_of = [](const CompactGroup& group, int64_t per_block) {
    return static_cast<uint32_t>(ceil_div<int64_t>(group.vectors, per_block));
  };
  int64_t per_block = kCompactThreads * kCompactUnroll;
  for (; per_block > kCompactThreads; per_block /= 2) {
    int64_t blocks = 0;
    for (int g = 0; g < table.groups; ++g)
      blocks += int64_t(blocks_of(table.group[g], per_block)) * table.group[g].blocks.value;
    if (blocks >= 2 * limits.sm_count) break;
  }
  per_block =
      limits.planned_power(Planned::kGatherVectors, per_block, kCompactThreads, kCompactThreads * kCompactUnroll);
  table.vectors_per_block = static_cast<uint16_t>(per_block);
  for (int g = 0; g < table.groups; ++g) {
    CompactGroup& group = table.group[g];
    const uint32_t tensors = group.blocks.value;
    group.first_block = table.blocks;
    group.blocks = make_divisor(blocks_of(group, per_block));
    table.blocks += group.blocks.value * tensors;
  }
}

cudaError_t launch_gather_compact(const std::vector<CompactTable>& tables, CallStream& stream);

// slots[b, t] = the n with indices[b, n] = t, or -1: the gather with these indices is the gather's transpose.
struct InvertProblem {
  const int64_t* indices;
  int64_t batch_stride, entry_stride;
  int64_t* slots;  // [batch, size]
  int64_t batch, kept, size;
};

cudaError_t launch_invert_indices(const InvertProblem& problem, const DeviceLimits& limits, CallStream& stream);

}  // namespace tokenprune
