// Softmax statistics and probabilities of one key/value head against one block of query rows, as a table of functions
// chosen at run time like those of rows.h.
//
// The rows of all query heads of the group (grouped-query attention) are laid side by side, head after head, and called
// lanes: lane = head_in_group * rows + row. There are two layouts of the logits. `lanes`: logits[key][lane], vectors
// run over lanes, keys are read as they lie and softmax is vertical. `few`, for so few rows that lanes would stay
// empty: logits[lane][key], vectors run over the dimension in the dot products and over keys afterwards.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/half.h"

namespace tokenprune {

// Keys whose exponentials share one maximum. The chunk's logits are still in the first-level cache when they are
// exponentiated; the chunks' maxima become one factor per chunk and lane.
constexpr int64_t kAttentionChunk = 96;
constexpr int64_t kAttentionFewLanes = 8;  // up to here `few` is faster

template <class T>
struct AttentionHead {
  using A = Wide<T>;
  const T* query;
  int64_t query_head_stride, query_row_stride;
  const T* key;
  int64_t key_stride;
  int64_t group, rows, keys, dim;  // query heads per key head, query rows of this block
  A scale;
  const A* key_norms;        // with cosine, else null
  const uint8_t* key_mask;   // bytes of a bool tensor, or null
  const int64_t* positions;  // of the rows when causal, else null
  const A* lse_in;           // given, or null: computed
  A* lse;                    // computed ones, and their entropy; may be null when lse_in is not
  A* entropy;
  int64_t stat_stride;  // between the heads of lse_in, lse and entropy
};

// Scratch memory of one thread. Every array starts on a cache line.
template <class A>
struct AttentionSpace {
  A* query;       // the rows, widened and transposed
  A* key;         // one chunk of keys, widened or copied
  A* logits;      // then exponentials
  A* factors;     // what makes them probabilities: [chunk][lane], or [lane]
  A* sums;        // [2][chunk][lane]
  int64_t lanes;  // row stride of logits: lanes or keys, rounded up to whole vectors
  bool keep;      // false: only lse and entropy are wanted, the logits of one chunk overwrite the last one's
};

// The probabilities of one group of heads added to (or, first, stored in) what earlier heads left.
template <class A>
struct AttentionGather {
  int64_t rows, keys, head_begin, head_end;  // heads within the group
  bool max, first;
  A* into;         // lanes: [key][stride], few: [row][stride]
  int64_t stride;  // rows or keys, rounded up to whole vectors
};

// Reduction of gathered probabilities over the rows of one block, for a range of keys.
template <class A>
struct AttentionReduce {
  const A* from;
  int64_t stride;              // as AttentionGather::stride
  int64_t parts, part_stride;  // partial results of several head ranges, combined here in order
  bool max_heads;
  A head_divisor;
  int64_t rows;
  const A* row_valid;  // 1 or 0 per row, 0 in the padding up to whole vectors
  int64_t last;        // the row that `last` takes, or -1 if it is not in this block
  const int* kinds;    // 0 mean (a sum here), 1 sum, 2 max, 3 last
  int64_t n_kinds;
  A* out;  // [kind][kind_stride], combined with what is there unless first
  int64_t kind_stride;
  bool first;
};

template <class T>
struct AttentionKernels {
  using A = Wide<T>;
  int width;  // lanes come in multiples of it: the elements of a vector, at least 4
  void (*norms)(const T* rows, int64_t row_stride, int64_t n, int64_t dim, A* out);  // max(||row||, kNormFloor)
  void (*softmax_lanes)(const AttentionHead<T>& head, const AttentionSpace<A>& space);
  void (*gather_lanes)(const AttentionGather<A>& gather, const AttentionSpace<A>& space);
  void (*reduce_lanes)(const AttentionReduce<A>& reduce, int64_t key_begin, int64_t key_end);
  void (*softmax_few)(const AttentionHead<T>& head, const AttentionSpace<A>& space);
  void (*gather_few)(const AttentionGather<A>& gather, const AttentionSpace<A>& space);
  void (*reduce_few)(const AttentionReduce<A>& reduce, int64_t key_begin, int64_t key_end);
};

template <class T>
const AttentionKernels<T>& attention_kernels();

}  // namespace tokenprune
