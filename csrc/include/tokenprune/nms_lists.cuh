// The first two launches of spatial_semantic_nms: what a selection needs of every token, and who suppresses whom.
#pragma once

#include "tokenprune/greedy.cuh"
#include "tokenprune/math.h"
#include "tokenprune/nms.h"
#include "tokenprune/nms_dots.cuh"

namespace tokenprune {

// A token that a pick suppresses. A list that is not full ends with kEnd; one that has no room for them all says
// kOverflow instead.
struct alignas(8) NmsEntry {
  int32_t index;
  float weight;
};
constexpr int32_t kEnd = -1, kOverflow = -2;
constexpr float kNoWeight = -1;  // in the table of weights, which are not negative: the pick does not reach the token

struct NmsWorkspace {
  float2* coordinates;  // [batch * n], kNmsAxes of each
  float* norms;         // [batch * n]
  uint32_t* keys;       // [batch * n], order_key of the scores; kNoKey: not available
  NmsEntry* lists;      // [batch * n, capacity], ascending; or
  float* weights;       // [batch * n, n], kNoWeight where a token is not reached
};

__device__ __forceinline__ NmsWorkspace nms_workspace(const NmsProblem& p) {
  const int64_t tokens = p.batch * p.n;
  auto* coordinates = static_cast<float2*>(p.workspace);
  auto* norms = reinterpret_cast<float*>(coordinates + tokens);
  auto* keys = reinterpret_cast<uint32_t*>(norms + tokens);
  uint32_t* rest = keys + tokens;
  return {coordinates, norms, keys, reinterpret_cast<NmsEntry*>(rest), reinterpret_cast<float*>(rest)};
}

__device__ __forceinline__ float load_float(const FloatRows& rows, int64_t offset) {
  switch (rows.type) {
    case FloatType::kFloat16:
      return to_float(static_cast<const __half*>(rows.data)[offset]);
    case FloatType::kBfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(rows.data)[offset]);
    default:
      return static_cast<const float*>(rows.data)[offset];
  }
}

__device__ __forceinline__ float2 load_coordinates(const FloatRows& positions, int64_t sample, int64_t token) {
  static_assert(kNmsAxes == 2, "a float2 holds the coordinates");
  const int64_t first = sample * positions.batch_stride + token * positions.token_stride;
  return make_float2(load_float(positions, first), load_float(positions, first + 1));
}

template <class T>
__device__ __forceinline__ const T* feature_row(const NmsProblem& p, int64_t sample, int64_t token) {
  return static_cast<const T*>(p.features) + sample * p.feature_batch_stride + token * p.feature_row_stride;
}

template <class T>
__device__ __forceinline__ bool wide_features(const NmsProblem& p, int64_t sample) {
  return wide_rows(feature_row<T>(p, sample, 0), p.feature_row_stride);
}

// --- one token, and pairs of them ------------------------------------------------------------------------------------

struct NmsToken {
  float2 coordinates;
  float norm;
  int64_t group;
};

__device__ __forceinline__ NmsToken load_token(const NmsProblem& p, const NmsWorkspace& w, int64_t sample, int64_t i) {
  const int64_t at = sample * p.n + i;
  return {w.coordinates[at], w.norms[at], p.groups == nullptr ? 0 : p.groups[sample * p.group_stride + i]};
}

// Without fused multiply-adds: whether a token at the edge of the radius is near does not depend on the backend.
__device__ __forceinline__ float squared_distance(const NmsToken& a, const NmsToken& b) {
  const float dx = __fsub_rn(a.coordinates.x, b.coordinates.x), dy = __fsub_rn(a.coordinates.y, b.coordinates.y);
  return __fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy));
}

// Whether the pick can change the other token. Where the spatial factor alone, which bounds the weight, has no effect,
// the long dot product is left out; a vector that is not a number still makes the weight one.
__device__ __forceinline__ bool reaches(const NmsSuppression& by, const NmsToken& pick, const NmsToken& other) {
  const float squared = squared_distance(pick, other);
  if (!(squared <= by.max_squared_distance) || pick.group != other.group) return false;
  const float bound = expf(-squared / by.two_spatial2);
  if (by.hard) return bound >= by.threshold;
  return 1 - bound != 1 || pick.norm != pick.norm || other.norm != other.norm;
}

__device__ __forceinline__ float weight_of(const NmsSuppression& by, const NmsToken& pick, const NmsToken& other,
                                           float dot) {
  // An infinite norm belongs to a vector too large for its squares: its unit vector is 0. NaN stays NaN.
  const float cosine = std::isinf(pick.norm + other.norm) ? 0 : dot / other.norm / pick.norm;
  return suppression(cosine, squared_distance(pick, other), by.two_spatial2, by.two_semantic2);
}

// An infinite sigma_semantic makes that factor 1 whatever the cosine: no dot product is needed.
__device__ __forceinline__ int64_t semantic_dim(const NmsProblem& p) {
  return std::isinf(p.by.two_semantic2) ? 0 : p.dim;
}

// --- launch 1: one warp per token ------------------------------------------------------------------------------------

// ||row||, at least kNormFloor, in every lane; inf of a row too large for its squares, NaN if the unit vector contains
// one.
template <class T>
__device__ __forceinline__ float warp_norm(const T* row, int64_t dim, bool wide) {
  constexpr int kStride = kWarp * kVector<T>;
  float sum = 0;
  // Whole vectors come eight at a time: the barrier keeps the compiler from waiting for one before it asks for the next.
  const auto add_up = [&](auto whole) {
    constexpr int kAhead = whole.value ? 8 : 1;
    for (int64_t from = 0; from < dim; from += kAhead * kStride) {
      Vector<T> ahead[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t k = from + a * kStride + lane_id() * kVector<T>;
        ahead[a] = whole.value && k < dim ? load_vector<true>(row, k, dim, true) : Vector<T>{};
        if (!whole.value) ahead[a] = load_vector<false>(row, k, dim, wide);
      }
      __syncwarp();
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        float part = 0;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) part = fmaf(to_float(ahead[a].lane[i]), to_float(ahead[a].lane[i]), part);
        sum += part;
      }
    }
  };
  if (wide && dim % kVector<T> == 0)
    add_up(std::true_type());
  else
    add_up(std::false_type());
  const float norm = norm_from_squares(warp_reduce(sum, Sum()));
  if (!std::isinf(norm)) return norm;
  bool infinite = false;
  for (int64_t k = lane_id(); k < dim; k += kWarp) infinite |= std::isinf(to_float(row[k]));
  return __any_sync(kAllLanes, infinite) ? NAN : norm;
}

template <class T>
__global__ void __launch_bounds__(kNmsPrepareThreads, 4) nms_prepare_kernel(const NmsProblem p) {
  let_next_launch_start();
  const NmsWorkspace w = nms_workspace(p);
  constexpr int64_t warps = kNmsPrepareThreads / kWarp;
  for (int64_t at = blockIdx.x * warps + warp_id(); at < p.batch * p.n; at += gridDim.x * warps) {
    const int64_t sample = at / p.n, i = at % p.n;
    const bool available = p.mask == nullptr || p.mask[sample * p.mask_stride + i];
    const float norm = available ? warp_norm(feature_row<T>(p, sample, i), p.dim, wide_features<T>(p, sample)) : 1;
    if (lane_id() != 0) continue;
    const float score = load_float(p.scores, sample * p.scores.batch_stride + i * p.scores.token_stride);
    w.coordinates[at] = load_coordinates(p.positions, sample, i);
    w.norms[at] = norm;
    w.keys[at] = order_key(score, available);
  }
}

// --- launch 2: the lists of 16 tokens, the columns of one split ------------------------------------------------------

constexpr int kPendingColumns = 512;  // a power of two, at least kNmsColumnTile - 1 + kNmsThreads
constexpr int kPartialStride = kNmsColumnTile + 8;

// A column that some of the block's rows reach: bit r says that row r does.
struct ReachedColumn {
  int32_t index;
  uint32_t rows;
};

struct NmsListShared {
  int64_t sample;
  int32_t first, begin, end;  // the rows are the tokens first, first + 1, ..., the columns [begin, end)
  NmsToken rows[kNmsRowTile];
  uint32_t wanted, overflowing;            // the rows that get a list, and those for which it is too short
  int32_t counts[kNmsRowTile];             // entries of a list before the current tile
  ReachedColumn pending[kPendingColumns];  // a ring
  int32_t warp_columns[kNmsThreads / kWarp];
  uint64_t row_columns[kNmsRowTile];  // bit c: the row reaches column c of the tile
  float partial[kSegments][kNmsRowTile][kPartialStride];
};

// Which of the block's rows reach column j.
__device__ __forceinline__ uint32_t rows_reaching(const NmsProblem& p, const NmsWorkspace& w, const NmsListShared& s,
                                                  int32_t j) {
  if (w.keys[s.sample * p.n + j] == kNoKey) return 0;
  const NmsToken column = load_token(p, w, s.sample, j);
  uint32_t reached = 0;
#pragma unroll 4
  for (int r = 0; r < kNmsRowTile; ++r)
    if (s.first + r != j && reaches(p.by, s.rows[r], column)) reached |= 1u << r;
  return reached;
}

// Adds to s.counts how many of the columns [begin, end) each row reaches. Ends with a barrier.
__device__ __forceinline__ void count_reached(const NmsProblem& p, const NmsWorkspace& w, NmsListShared& s,
                                              int32_t begin, int32_t end) {
  int32_t count = 0;  // of row lane_id()
  for (int32_t from = begin + warp_id() * kWarp; from < end; from += kNmsThreads) {
    const int32_t j = from + lane_id();
    const uint32_t reached = j < end ? rows_reaching(p, w, s, j) : 0;
    if (!__any_sync(kAllLanes, reached != 0)) continue;
#pragma unroll
    for (int r = 0; r < kNmsRowTile; ++r) {
      const int32_t of_row = __popc(__ballot_sync(kAllLanes, reached >> r & 1));
      if (lane_id() == r) count += of_row;
    }
  }
  if (count > 0) atomicAdd(&s.counts[lane_id()], count);
  __syncthreads();
}

// Appends the columns of this round that some row reaches, in order; returns the new tail. Contains barriers, the last
// one after everything is written.
__device__ __forceinline__ int append_columns(NmsListShared& s, int tail, ReachedColumn mine) {
  const uint32_t reached = __ballot_sync(kAllLanes, mine.rows != 0);
  if (lane_id() == 0) s.warp_columns[warp_id()] = __popc(reached);
  __syncthreads();
  int slot = tail + __popc(reached & ((1u << lane_id()) - 1));
  for (int warp = 0; warp < kNmsThreads / kWarp; ++warp) {
    if (warp < warp_id()) slot += s.warp_columns[warp];
    tail += s.warp_columns[warp];
  }
  if (mine.rows != 0) s.pending[slot % kPendingColumns] = mine;
  __syncthreads();
  return tail;
}

// Thread x finishes column x % 64 of a tile for the rows x / 64, x / 64 + 4, ...
constexpr int kRowsOfThread = kNmsRowTile * kNmsColumnTile / kNmsThreads;
__device__ __forceinline__ int row_of_thread(int i) {
  return threadIdx.x / kNmsColumnTile + i * (kNmsThreads / kNmsColumnTile);
}

// The products of the block's rows with up to 64 pending columns, into s.partial.
template <class T>
__device__ __forceinline__ void multiply_columns(const NmsProblem& p, NmsListShared& s, int head, int columns) {
  const int half = warp_id() / kSegments * kDotColumns;
  if (half >= columns) return;
  auto& partial = s.partial[warp_id() % kSegments];
  warp_dots<T>(
      [&](int r) { return feature_row<T>(p, s.sample, min(s.first + r, static_cast<int32_t>(p.n) - 1)); },
      [&](int c) {
        return feature_row<T>(p, s.sample, s.pending[(head + min(half + c, columns - 1)) % kPendingColumns].index);
      },
      segment_of(warp_id() % kSegments, semantic_dim(p)), wide_features<T>(p, s.sample),
      [&](int r, int c, float x, float y) { *reinterpret_cast<float2*>(&partial[r][half + c]) = make_float2(x, y); });
}

// Turns them into list entries. Ends with a barrier.
__device__ __forceinline__ void write_entries(const NmsProblem& p, const NmsWorkspace& w, NmsListShared& s,
                                              int64_t capacity, int head, int columns) {
  const auto pending = [&](int c) {
    return c < columns ? s.pending[(head + c) % kPendingColumns] : ReachedColumn{s.first, 0};
  };
  const uint32_t low = pending(lane_id()).rows, high = pending(lane_id() + kWarp).rows;
#pragma unroll
  for (int i = 0; i < kNmsRowTile * kWarp / kNmsThreads; ++i) {
    const int r = warp_id() + i * (kNmsThreads / kWarp);
    const uint64_t below = __ballot_sync(kAllLanes, low >> r & 1), above = __ballot_sync(kAllLanes, high >> r & 1);
    if (lane_id() == 0) {
      s.counts[r] += __popcll(s.row_columns[r]);  // of the tile before this one
      s.row_columns[r] = above << kWarp | below;
    }
  }
  __syncthreads();
  const int c = threadIdx.x % kNmsColumnTile;
  const ReachedColumn column = pending(c);
  const NmsToken other = load_token(p, w, s.sample, column.index);
#pragma unroll
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int r = row_of_thread(i);
    const uint64_t of_row = s.row_columns[r];
    if (column.rows >> r & 1) {
      const float shares[kSegments] = {s.partial[0][r][c], s.partial[1][r][c], s.partial[2][r][c], s.partial[3][r][c]};
      const int slot = s.counts[r] + __popcll(of_row & ((uint64_t(1) << c) - 1));
      const float weight = weight_of(p.by, s.rows[r], other, sum_of_segments(shares));
      w.lists[(s.sample * p.n + s.first + r) * capacity + slot] = {column.index, weight};
    }
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kNmsThreads, 2)
    nms_lists_kernel(const NmsProblem p, int64_t capacity, int32_t splits, int32_t split_columns) {
  TOKENPRUNE_SHARED(NmsListShared, s);
  let_next_launch_start();
  wait_for_launch_before();
  const NmsWorkspace w = nms_workspace(p);
  const int32_t n = static_cast<int32_t>(p.n), tiles = ceil_div(n, kNmsRowTile);
  for (int64_t item = blockIdx.x; item < p.batch * tiles * splits; item += gridDim.x) {
    __syncthreads();
    if (threadIdx.x == 0) {
      s.sample = item / splits / tiles;
      s.first = static_cast<int32_t>(item / splits % tiles) * kNmsRowTile;
      s.begin = static_cast<int32_t>(item % splits) * split_columns;
      s.end = min(s.begin + split_columns, n);
    }
    __syncthreads();
    bool wanted = false;  // a masked token is never picked
    if (threadIdx.x < kNmsRowTile) {
      const int32_t row = s.first + static_cast<int32_t>(threadIdx.x);
      wanted = row < n && w.keys[s.sample * n + row] != kNoKey;
      s.rows[threadIdx.x] = load_token(p, w, s.sample, min(row, n - 1));
      s.counts[threadIdx.x] = 0;
      s.row_columns[threadIdx.x] = 0;
    }
    if (warp_id() == 0) s.wanted = __ballot_sync(kAllLanes, wanted);
    if (threadIdx.x == 0) s.overflowing = 0;
    __syncthreads();
    if (capacity < n - 1) {  // otherwise every list has room
      count_reached(p, w, s, 0, n);
      if (warp_id() == 0) {
        const bool overflows = lane_id() < kNmsRowTile && s.counts[lane_id() % kNmsRowTile] > capacity;
        const uint32_t rows = s.wanted & __ballot_sync(kAllLanes, overflows);
        __syncwarp();
        if (lane_id() < kNmsRowTile) s.counts[lane_id()] = 0;
        if (lane_id() == 0) {
          s.wanted &= ~rows;
          s.overflowing = rows;
        }
      }
      __syncthreads();
    }
    if (s.begin > 0) count_reached(p, w, s, 0, s.begin);
    int head = 0, tail = 0;
    for (int32_t from = s.begin;;) {
      if (tail - head < kNmsColumnTile && from < s.end) {
        const int32_t j = from + static_cast<int32_t>(threadIdx.x);
        const ReachedColumn mine{j, j < s.end ? rows_reaching(p, w, s, j) & s.wanted : 0};
        if (__syncthreads_or(mine.rows != 0)) tail = append_columns(s, tail, mine);
        from += kNmsThreads;
      } else if (tail > head) {
        const int columns = min(tail - head, kNmsColumnTile);
        multiply_columns<T>(p, s, head, columns);
        write_entries(p, w, s, capacity, head, columns);
        head += columns;
      } else {
        break;
      }
    }
    if (s.end < n) continue;
    // As many marks as the threads of a selecting block look for.
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int r = row_of_thread(i);
      const bool overflows = s.overflowing >> r & 1;
      if (!overflows && (s.wanted >> r & 1) == 0) continue;
      NmsEntry* list = w.lists + (s.sample * n + s.first + r) * capacity;
      const int64_t entries = overflows ? 0 : s.counts[r] + __popcll(s.row_columns[r]);
      const int64_t marks = min(capacity, entries + kNmsMostSelectThreads);
      for (int64_t e = entries + threadIdx.x % kNmsColumnTile; e < marks; e += kNmsColumnTile)
        list[e] = {overflows ? kOverflow : kEnd, 0};
    }
  }
}

}  // namespace tokenprune
