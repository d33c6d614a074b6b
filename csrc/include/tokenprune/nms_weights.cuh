// The second launch of spatial_semantic_nms where the weights of all pairs of tokens fit into memory: an n x n table,
// in which a pick finds its row. Where they do not, nms_lists.cuh makes a list for every token.
//
//   64 tokens a --+                                            +--> sums of a segment --+
//                 +-- 128 B per row, cp.async, ring of 3 ------+                        +-- cluster --> weights (a, b)
//   64 tokens b --+                                            +--> ...of 4 blocks -----+               weights (b, a)
//
// A cluster of kSegments blocks makes a pair of tiles, once for both directions: dot products are the same, bit for
// bit. Each block multiplies one segment of the channels, in the order of nms_dots.cuh, and then turns the dot products
// of 16 of the 64 rows into weights. A pair of tiles without neighbours multiplies nothing.
//
// Grid samples * pairs of tiles * 4, 128 threads, 48 KiB of dynamic shared memory. Bytes: 128 rows per pair of tiles
// with neighbours, from L2; 4 per pair of tokens written.
#pragma once

#include "tokenprune/nms_lists.cuh"

namespace tokenprune {

constexpr int kWeightStages = 3, kWeightRowBytes = 128, kWeightRowsOfWarp = 16, kWeightsOfThread = 8;
constexpr int kWeightOperandBytes = kNmsWeightTile * kWeightRowBytes;
constexpr int kWeightSumStride = kNmsWeightTile + 4;  // neighbouring rows in distinct banks
static_assert(kWeightStages * 2 * kWeightOperandBytes == kNmsWeightShared);
static_assert(kNmsWeightTile * kWeightSumStride * sizeof(float) <= kNmsWeightShared);
static_assert(kSegments == kNmsWeightCluster && kNmsWeightThreads == 2 * kNmsWeightTile);

struct NmsWeightShared {
  NmsToken tokens[2][kNmsWeightTile];
  bool available[2][kNmsWeightTile];
};

// Unit `u` (16 bytes) of a row of a stage. Neighbouring rows put it into distinct banks, both for the 8 lanes that read
// one unit of 8 rows (float32) and for those that read 4 units of 2 rows (tensor cores).
__device__ __forceinline__ unsigned char* weight_unit(unsigned char* operand, int row, int u) {
  return operand + row * kWeightRowBytes + ((u ^ (row % 2 * 4 + row / 2 % 4)) << 4);
}

// A thread's sums of a segment, 4 x 8 of them. put(row, column, sum) gets them all.
template <class T>
struct SegmentSums {
  static constexpr bool kMma = sizeof(T) == 2;
  static constexpr int kElements = kWeightRowBytes / sizeof(T);  // of a row in a stage
  float sums[8][4] = {};

  // Adds a stage of which `left` elements belong to the segment.
  __device__ __forceinline__ void add(unsigned char* a, unsigned char* b, int left) {
    const int lane = lane_id(), first = warp_id() * kWeightRowsOfWarp;
    if constexpr (kMma) {
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int k = 0; k < kElements; k += kChunk) {
        if (k >= left) break;
        const int u = k / kVector<T> + t;
        const uint4 low = *reinterpret_cast<const uint4*>(weight_unit(a, first + g, u)),
                    high = *reinterpret_cast<const uint4*>(weight_unit(a, first + g + 8, u));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float part[4] = {};
          multiply_step<T>(part, low, high, *reinterpret_cast<const uint4*>(weight_unit(b, 8 * j + g, u)));
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j][i] += part[i];
        }
      }
    } else {
      static_assert(kElements == kChunk || kMma);
      float part[8][4] = {};
#pragma unroll 1  // unrolled, the reads of several units would spill
      for (int u = 0; u < 8; ++u) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = *reinterpret_cast<const float4*>(weight_unit(a, first + lane / 8 + 4 * i, u));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float4 y = *reinterpret_cast<const float4*>(weight_unit(b, 8 * j + lane % 8, u));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float sum = fmaf(x[i].x, y.x, part[j][i]);
            sum = fmaf(x[i].y, y.y, sum);
            sum = fmaf(x[i].z, y.z, sum);
            part[j][i] = fmaf(x[i].w, y.w, sum);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] += part[j][i];
    }
  }

  template <class Put>
  __device__ __forceinline__ void put_all(const Put& put) const {
    const int lane = lane_id(), first = warp_id() * kWeightRowsOfWarp;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kMma)
          put(first + lane / 4 + i / 2 * 8, 8 * j + lane % 4 * 2 + i % 2, sums[j][i]);
        else
          put(first + lane / 8 + 4 * i, 8 * j + lane % 8, sums[j][i]);
      }
  }
};

// The block's segment of the products of two tiles, whose first tokens are first(0) and first(1).
template <class T, class First>
__device__ __forceinline__ SegmentSums<T> multiply_segment(const NmsProblem& p, int64_t sample, const First& first,
                                                           unsigned char* ring) {
  constexpr int kElements = SegmentSums<T>::kElements, kRows = 2 * kNmsWeightTile / 16;
  const Segment segment = segment_of(static_cast<int>(cluster_rank()), semantic_dim(p));
  const int elements = static_cast<int>(segment.end - segment.begin), chunks = ceil_div(elements, kElements);
  const bool wide = wide_features<T>(p, sample);
  // A thread copies one unit of every 16th row; instead of rows that do not exist the last one.
  const int u = threadIdx.x % 8, row = threadIdx.x / 8;
  unsigned char* const to = weight_unit(ring, row, u);
  const T* from[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    from[i] = feature_row<T>(p, sample, min(first(i / (kRows / 2)) + row + i % (kRows / 2) * 16, p.n - 1)) +
              segment.begin + u * kVector<T>;
  int element = u * kVector<T>, stage_to_fill = 0;
  const auto load = [&] {
    unsigned char* at = to + stage_to_fill * 2 * kWeightOperandBytes;
    if (wide && element + kVector<T> <= elements) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) cp_async_16(at + i * 16 * kWeightRowBytes, from[i], true);
    } else if (element < round_up(elements, kElements)) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Vector<T> v = load_vector<false>(from[i] - element, element, elements, wide);
        std::memcpy(at + i * 16 * kWeightRowBytes, &v, sizeof v);
      }
    }
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < kRows; ++i) from[i] += kElements;
    element += kElements;
    stage_to_fill = stage_to_fill == kWeightStages - 1 ? 0 : stage_to_fill + 1;
  };
  SegmentSums<T> mine;
  load();
  load();
  int stage = 0;
  for (int c = 0; c < chunks; ++c) {
    cp_async_wait<1>();
    __syncthreads();
    load();
    unsigned char* a = ring + stage * 2 * kWeightOperandBytes;
    mine.add(a, a + kWeightOperandBytes, elements - c * kElements);
    stage = stage == kWeightStages - 1 ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncthreads();  // the ring is free
  return mine;
}

template <class T>
__global__ void __launch_bounds__(kNmsWeightThreads, 3) nms_weights_kernel(const NmsProblem p) {
  TOKENPRUNE_SHARED(NmsWeightShared, s);
  let_next_launch_start();
  wait_for_launch_before();
  const NmsWorkspace w = nms_workspace(p);
  // Tile a meets the tiles a, a + 1, ..., half way round: so each pair once, but for the last of an even number.
  const int64_t tiles = ceil_div<int64_t>(p.n, kNmsWeightTile), partners = tiles / 2 + 1;
  const int64_t item = blockIdx.x / kSegments, sample = item / partners / tiles;
  const int64_t a = item / partners % tiles, apart = item % partners, b = (a + apart) % tiles;
  if (2 * apart == tiles && a >= apart) return;
  const auto first = [&](int tile) { return (tile == 0 ? a : b) * kNmsWeightTile; };
  const int column = threadIdx.x % kNmsWeightTile, part = threadIdx.x / kNmsWeightTile;
  const int64_t token = first(part) + column;
  s.tokens[part][column] = load_token(p, w, sample, min(token, p.n - 1));
  s.available[part][column] = token < p.n && w.keys[sample * p.n + token] != kNoKey;
  __syncthreads();
  const auto near = [&](int tile, int r, int c) {  // token r of this tile and token c of the other one
    return s.available[tile][r] && s.available[1 - tile][c] && first(tile) + r != first(1 - tile) + c &&
           reaches(p.by, s.tokens[tile][r], s.tokens[1 - tile][c]);
  };
  bool any = false;
  for (int i = 0; i < kNmsWeightTile / 2; ++i) any = any || near(0, part * (kNmsWeightTile / 2) + i, column);
  any = __syncthreads_or(any);

  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  if (any) {
    multiply_segment<T>(p, sample, first, dynamic_shared()).put_all([&](int r, int c, float sum) {
      sums[r * kWeightSumStride + c] = sum;
    });
    cluster_sync();
  }
#pragma unroll 1
  for (int tile = 0; tile < (a == b ? 1 : 2); ++tile) {
    const int row = static_cast<int>(cluster_rank()) * kWeightRowsOfWarp + part * kWeightsOfThread;
    const int64_t other = first(1 - tile) + column;
    float* out = w.weights + (sample * p.n + first(tile) + row) * p.n + other;
#pragma unroll 1
    for (int r = row; r < row + kWeightsOfThread && first(tile) + r < p.n; ++r, out += p.n) {
      float weight = kNoWeight;
      if (any && near(tile, r, column)) {
        float shares[kSegments];
        float* at = sums + (tile == 0 ? r * kWeightSumStride + column : column * kWeightSumStride + r);
#pragma unroll
        for (int segment = 0; segment < kSegments; ++segment) shares[segment] = *cluster_shared(at, segment);
        weight = weight_of(p.by, s.tokens[tile][r], s.tokens[1 - tile][column], sum_of_segments(shares));
      }
      if (other < p.n) *out = weight;
    }
  }
  if (any) cluster_sync();  // everybody has read this block's sums
}

}  // namespace tokenprune
