// coverage_sample: greedy facility location by lazy evaluation (Minoux, 1978). A gain only falls as rows are covered,
// rounding included: s - C, a product with a weight, and a sum in a fixed order are monotone to the bit. So the gain of an
// earlier step bounds the present one from above, and a token is evaluated only when its bound could win.
//
// 1. columns: the gain of a token reads its column, which similarity [R, N] scatters over R rows: they are transposed
//    once, as float32 with negative values and NaN as 0, tile by tile. 256 threads; reads R N elements, writes 4 R N bytes.
// 2. greedy: one block, or one cluster of blocks, per sample makes all picks (greedy.cuh). Tokens go round robin to the
//    blocks and, in each of them, to the warps: neighbours are alike, and their gains are large together. A step is
//      a. the best bound of the block, whose warp evaluates that token: the floor;
//      b. every warp evaluates its own tokens, the best bound first, until its best one is up to date or below the floor;
//      c. the best of all tokens: one barrier of the block and one of the cluster;
//      d. every block raises its C_r to the pick's column.
//    grid: samples * cluster; block: up to kCoverageThreads; shared: CoveragePlan::shared. A step reads one column for every
//    token evaluated, and one for every block.
//
// A gain is summed by a warp whatever the plan is: equal columns have equal gains.
#pragma once

#include "tokenprune/coverage.h"
#include "tokenprune/greedy.cuh"

namespace tokenprune {

struct CoverageWorkspace {
  float* columns;  // [samples, n, width]
  float* state;    // [samples * cluster, coverage_state, rounded up to 4]; null where it is in shared memory
  int64_t width, state_pitch;
  int per_warp;
};

__device__ __forceinline__ float positive(float x) { return x > 0 ? x : 0; }  // NaN and negative values count as 0

template <class T>
__global__ void __launch_bounds__(256) coverage_columns_kernel(const CoverageProblem p, const CoverageWorkspace w,
                                                               int64_t row_tiles, int64_t token_tiles) {
  TOKENPRUNE_SHARED(float[kCoverageTile][kCoverageTile + 1], tile);
  let_next_launch_start();
  const int64_t block = blockIdx.x, sample = block / (row_tiles * token_tiles);
  const int64_t row0 = block / token_tiles % row_tiles * kCoverageTile, token0 = block % token_tiles * kCoverageTile;
  const T* from = static_cast<const T*>(p.similarity) + sample * p.batch_stride;
#pragma unroll 4
  for (int q = threadIdx.x; q < kCoverageTile * kCoverageTile; q += 256) {
    const int64_t r = row0 + q / kCoverageTile, i = token0 + q % kCoverageTile;
    tile[q / kCoverageTile][q % kCoverageTile] =
        r < p.rows && i < p.n ? positive(to_float(from[r * p.row_stride + i])) : 0;
  }
  wait_for_launch_before();  // which may still read the columns of other samples
  __syncthreads();
  float* to = w.columns + sample * p.n * w.width;
#pragma unroll 4
  for (int q = threadIdx.x; q < kCoverageTile * kCoverageTile; q += 256) {
    const int64_t r = row0 + q % kCoverageTile, i = token0 + q / kCoverageTile;
    if (r < w.width && i < p.n) to[i * w.width + r] = tile[q % kCoverageTile][q / kCoverageTile];
  }
}

// The rule of a block.
struct CoverageRule {
  const float* const columns;  // of the sample
  const float* const quality;  // of the sample, or null
  const int n, width, per_warp;
  float *const covered, *const weights;  // [width]: C_r
  uint32_t *const key,
      *const seen;         // [warps, per_warp]: the last gain, and how many picks that covered something it knows
  int64_t* const indices;  // null but for the first block
  float* const gains;
  Candidate* const bounds;  // [kWarp + 1] in shared memory: of the warps; the floor
  uint32_t made = 1;        // picks that covered something, and one: nothing has been evaluated at 0
  Candidate mine = kNoCandidate;

  __device__ __forceinline__ int warps() const { return static_cast<int>(blockDim.x) / kWarp; }
  // The warp's t-th token.
  __device__ __forceinline__ int token(int t) const {
    return (t * warps() + warp_id()) * static_cast<int>(cluster_size()) + static_cast<int>(cluster_rank());
  }
  __device__ __forceinline__ int slot_of(int i) const {
    const int local = i / static_cast<int>(cluster_size());
    return local % warps() * per_warp + local / warps();
  }

  // The best bound of the warp's tokens, in all lanes.
  __device__ __forceinline__ Candidate best_bound() const {
    Candidate best = kNoCandidate;
    for (int t = lane_id(); t < per_warp; t += kWarp) {
      const uint32_t bound = key[warp_id() * per_warp + t];
      if (bound > best.key) best = {bound, static_cast<uint32_t>(token(t))};
    }
    return warp_best(best);
  }

  __device__ __forceinline__ bool is_fresh(Candidate c) const {
    return seen[slot_of(static_cast<int>(c.index))] == made;
  }

  // Brings a token of the warp up to date; its candidate, in all lanes.
  __device__ __forceinline__ Candidate evaluate(Candidate c) const {
    const int i = static_cast<int>(c.index), slot = slot_of(i);
    const float4* column = reinterpret_cast<const float4*>(columns + int64_t(i) * width);
    const float4 *cover = reinterpret_cast<const float4*>(covered), *weight = reinterpret_cast<const float4*>(weights);
    float4 sum = {};
#pragma unroll 4
    for (int r = lane_id(); r < width / 4; r += kWarp) {
      const float4 s = column[r], has = cover[r], by = weight[r];
      sum.x = __fmaf_rn(by.x, positive(s.x - has.x), sum.x);
      sum.y = __fmaf_rn(by.y, positive(s.y - has.y), sum.y);
      sum.z = __fmaf_rn(by.z, positive(s.z - has.z), sum.z);
      sum.w = __fmaf_rn(by.w, positive(s.w - has.w), sum.w);
    }
    const float total = warp_reduce((sum.x + sum.y) + (sum.z + sum.w), Sum());
    c.key = order_key(total * (quality == nullptr ? 1 : positive(quality[i])));
    __syncwarp();  // all lanes have read what was known of the token
    if (lane_id() == 0) {
      key[slot] = c.key;
      seen[slot] = made;
    }
    __syncwarp();
    return c;
  }

  // All threads call it; the barrier before the next call is that of cluster_best.
  __device__ __forceinline__ Candidate best() const {
    Candidate own = best_bound();
    const Candidate none = kNoCandidate;
    if (lane_id() == 0) bounds[warp_id()] = own;
    __syncthreads();
    const Candidate first = warp_best(lane_id() < warps() ? bounds[lane_id()] : none);
    if (first.key == kNoKey) return none;
    if (own.index == first.index) {
      if (!is_fresh(own)) own = evaluate(own);
      if (lane_id() == 0) bounds[kWarp] = own;
    }
    __syncthreads();
    const Candidate floor = bounds[kWarp];
    for (;;) {
      own = best_bound();
      if (floor < own) return none;
      if (is_fresh(own)) return own;
      evaluate(own);
    }
  }

  __device__ __forceinline__ void commit(int64_t slot, Candidate pick) {
    const int j = static_cast<int>(pick.index);
    if (threadIdx.x == 0) {
      if (indices != nullptr) {
        indices[slot] = j;
        gains[slot] = value_of_key(pick.key);
      }
      if (j % static_cast<int>(cluster_size()) == static_cast<int>(cluster_rank())) key[slot_of(j)] = kNoKey;
    }
    bool rose = false;
    for (int r = threadIdx.x; r < width; r += blockDim.x) {
      const float s = columns[int64_t(j) * width + r];
      if (s > covered[r]) {
        covered[r] = s;
        rose = rose || weights[r] > 0;
      }
    }
    made += __syncthreads_or(rose) ? 1 : 0;
  }
};

__global__ void __launch_bounds__(kCoverageThreads, 1)
    coverage_greedy_kernel(const CoverageProblem p, const CoverageWorkspace w) {
  TOKENPRUNE_SHARED(CandidateSlots, slots);
  TOKENPRUNE_SHARED(Candidate[kWarp + 1], bounds);
  wait_for_launch_before();
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  const int64_t sample = blockIdx.x / blocks;
  const int width = static_cast<int>(w.width), own = static_cast<int>(blockDim.x) / kWarp * w.per_warp;
  float* covered =
      w.state == nullptr ? reinterpret_cast<float*>(dynamic_shared()) : w.state + blockIdx.x * w.state_pitch;
  float* weights = covered + width;
  uint32_t *key = reinterpret_cast<uint32_t*>(weights + width), *seen = key + own;
  CoverageRule rule{w.columns + sample * p.n * w.width,
                    p.quality == nullptr ? nullptr : p.quality + sample * p.n,
                    static_cast<int>(p.n),
                    width,
                    w.per_warp,
                    covered,
                    weights,
                    key,
                    seen,
                    rank == 0 ? p.indices + sample * p.k : nullptr,
                    p.gains + sample * p.k,
                    bounds};
  for (int r = threadIdx.x; r < width; r += blockDim.x) {
    const bool counts = r < p.rows && (p.row_mask == nullptr || p.row_mask[sample * p.row_mask_stride + r]);
    covered[r] = 0;
    weights[r] = !counts ? 0 : p.row_weights == nullptr ? 1 : positive(p.row_weights[sample * p.rows + r]);
  }
  for (int t = lane_id(); t < w.per_warp; t += kWarp) {
    const int i = rule.token(t), slot = warp_id() * w.per_warp + t;
    key[slot] = i < p.n && (p.mask == nullptr || p.mask[sample * p.mask_stride + i]) ? order_key(INFINITY) : kNoKey;
    seen[slot] = 0;
  }
  __syncthreads();
  if (blocks > 1) cluster_sync();  // all blocks are there: their shared memory can be written
  const int64_t picked = greedy_select(rule, slots, p.k);
  if (rank != 0) return;
  for (int64_t slot = picked + threadIdx.x; slot < p.k; slot += blockDim.x) {
    rule.indices[slot] = -1;
    rule.gains[slot] = 0;
  }
  if (threadIdx.x == 0) p.counts[sample] = picked;
}

inline CoverageProblem samples_of(const CoverageProblem& p, int64_t first, int64_t count, int64_t element_size) {
  CoverageProblem part = samples_of(p, &CoverageProblem::similarity, first, count, element_size);
  if (p.row_weights != nullptr) part.row_weights += first * p.rows;
  if (p.quality != nullptr) part.quality += first * p.n;
  if (p.row_mask != nullptr) part.row_mask += first * p.row_mask_stride;
  part.gains += first * p.k;
  return part;
}

template <class T>
cudaError_t launch_coverage(const CoverageProblem& p, const CoveragePlan& plan, float* floats, CallStream& stream) {
  const CoverageWorkspace w{floats + plan.state_floats, plan.state_floats > 0 ? floats : nullptr, plan.width,
                            round_up<int64_t>(coverage_state(plan), 4), plan.per_warp};
  const int64_t row_tiles = ceil_div<int64_t>(plan.width, kCoverageTile),
                token_tiles = ceil_div<int64_t>(p.n, kCoverageTile);
  for (int64_t first = 0; first < p.batch; first += plan.samples) {
    const CoverageProblem part = samples_of(p, first, std::min(plan.samples, p.batch - first), sizeof(T));
    cudaError_t status = launch({part.batch * row_tiles * token_tiles, dim3(256), 0, stream},
                                coverage_columns_kernel<T>, part, w, row_tiles, token_tiles);
    if (status == cudaSuccess)
      status = launch({part.batch * plan.cluster, dim3(plan.block), static_cast<size_t>(plan.shared), stream,
                       static_cast<unsigned>(plan.cluster)},
                      coverage_greedy_kernel, part, w);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace tokenprune
