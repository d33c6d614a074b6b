// Inner products of kTile token rows with kTile others, by one block, into shared memory: the tensor cores for 16-bit
// types, fused multiply-adds for float32. The rows may be any rows of a sample.
//
// Both operands go through the same ring of kStages stages of 128 bytes per row (asynchronous copies). A product adds
// its terms in ascending order of the channel whichever row, slot of the tile or operand they come from, and
// multiplication commutes: <x, y> and <y, x> have the same bits, and so have the products of identical rows. (On the
// tensor cores this rests on each output of an mma being one function of its 16 pairs of factors.)
#pragma once

#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// The rows of one sample.
struct TokenRows {
  const void* data;  // [n, channels], last stride 1
  int64_t stride;    // elements
  int64_t channels;
  bool aligned;  // every row starts at a multiple of 16 bytes
};

constexpr int kRowBytes = 128;             // of a row in a stage
constexpr int kRowPitch = kRowBytes + 16;  // 8 rows in a column are in different banks
constexpr int kNoRow = -1;                 // a row of zeros

template <int kTile>
struct GramTile {
  static constexpr int kThreads = 2 * kTile;          // that compute; a larger block helps with the copies
  static constexpr int kBlocks = kTile > 64 ? 2 : 4;  // per multiprocessor at least: up to 128 registers
  static constexpr int kStages = kTile > 64 ? 2 : 3;
  static constexpr int kStageBytes = 2 * kTile * kRowPitch;
  static constexpr int kOutPitch = kTile + 1;  // floats; odd, so that rows and columns are free of bank conflicts
  static constexpr int kOutBytes = kTile * kOutPitch * static_cast<int>(sizeof(float));
  static constexpr int kShared = kStages * kStageBytes > kOutBytes ? kStages* kStageBytes : kOutBytes;
};

constexpr int kRowCopies = kRowBytes / 16;  // of a row in a stage, 16 bytes each

// Channels [begin, begin + 128 bytes) of kTile rows into `stage`, zeros past the end, for any rows.
template <class T, int kTile>
__device__ __forceinline__ void load_rows(const TokenRows& rows, const int* tokens, int64_t begin,
                                          unsigned char* stage) {
  constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
#pragma unroll 1
  for (int q = threadIdx.x; q < kTile * kDepth; q += blockDim.x) {
    const int token = tokens[q / kDepth];
    const int64_t channel = begin + q % kDepth;
    reinterpret_cast<T*>(stage + q / kDepth * kRowPitch)[q % kDepth] =
        token != kNoRow && channel < rows.channels ? static_cast<const T*>(rows.data)[token * rows.stride + channel]
                                                   : from_float<T>(0.0f);
  }
}

// The same for rows of whole 16-byte pieces at aligned addresses, asynchronously. A thread of kThreads copies one piece
// of every row that is its turn: `column` is that piece of token 0, `inside` says whether rows have it.
template <int kTile, int kThreads>
__device__ __forceinline__ void copy_rows(const unsigned char* column, uint32_t stride_bytes, bool inside,
                                          const int* tokens, unsigned char* stage) {
  constexpr int kStep = kThreads / kRowCopies;
  const int row = threadIdx.x / kRowCopies;
  unsigned char* target = stage + row * kRowPitch + threadIdx.x % kRowCopies * 16;
#pragma unroll
  for (int r = 0; r < kTile; r += kStep) {
    const int token = tokens[row + r];
    const uint64_t offset = uint64_t(static_cast<uint32_t>(max(token, 0))) * stride_bytes;
    cp_async_16(target + r * kRowPitch, column + offset, inside && token != kNoRow);
  }
}

// The outputs of one thread and the product of one stage, by arithmetic.
template <class T, int kTile>
struct TileProduct {  // tensor cores: a warp owns kTile / 2 rows and 32 columns
  static constexpr int kM = kTile / 32, kN = 4;
  float sum[kM][kN][4] = {};

  // Tensor cores truncate what they add, so 32 products start at zero in them, and the ordinary units add those up.
  __device__ __forceinline__ void add(const unsigned char* stage, int columns) {
    const int lane = lane_id(), row0 = warp_id() % 2 * (kTile / 2), column0 = warp_id() / 2 * 32;
    const unsigned char* left = stage + (row0 + lane % 16) * kRowPitch + lane / 16 * 16;
    const unsigned char* right = stage + (kTile + column0 + lane / 16 * 8 + lane % 8) * kRowPitch + lane / 8 % 2 * 16;
#pragma unroll 1  // unrolled, and with the left side loaded first, this would spill
    for (int k = 0; k < kRowBytes; k += 64) {
      uint32_t b[kN / 2][2][4];
#pragma unroll
      for (int n = 0; n < kN / 2; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (column0 + 16 * n < columns) ldmatrix_x4(b[n][i], right + n * 16 * kRowPitch + k + 32 * i);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) ldmatrix_x4(a[i], left + m * 16 * kRowPitch + k + 32 * i);
#pragma unroll
        for (int n = 0; n < kN / 2; ++n) {
          if (column0 + 16 * n >= columns) continue;
          float part[2][4] = {};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const uint32_t low[2] = {b[n][i][0], b[n][i][1]}, high[2] = {b[n][i][2], b[n][i][3]};
            mma_m16n8k16<T>(part[0], a[i], low);
            mma_m16n8k16<T>(part[1], a[i], high);
          }
#pragma unroll
          for (int e = 0; e < 8; ++e) sum[m][2 * n + e / 4][e % 4] += part[e / 4][e % 4];
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* out) const {
    const int group = lane_id() / 4, pair = lane_id() % 4 * 2;
    float* corner =
        out + (warp_id() % 2 * (kTile / 2) + group) * GramTile<kTile>::kOutPitch + warp_id() / 2 * 32 + pair;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          corner[(16 * m + e / 2 * 8) * GramTile<kTile>::kOutPitch + 8 * n + e % 2] = sum[m][n][e];
  }
};

template <int kTile>
struct TileProduct<float, kTile> {  // a thread owns every kRowStep-th of the rows and every 16th of the columns
  static constexpr int kRowStep = GramTile<kTile>::kThreads / 16, kM = kTile / kRowStep, kN = kTile / 16;
  float sum[kM][kN] = {};

  __device__ __forceinline__ void add(const unsigned char* stage, int columns) {
    const unsigned char* left = stage + threadIdx.x / 16 * kRowPitch;
    const unsigned char* right = stage + (kTile + threadIdx.x % 16) * kRowPitch;
#pragma unroll 1
    for (int k = 0; k < kRowBytes; k += 16) {
      float4 a[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) a[m] = *reinterpret_cast<const float4*>(left + m * kRowStep * kRowPitch + k);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if (16 * n >= columns) continue;
        const float4 b = *reinterpret_cast<const float4*>(right + n * 16 * kRowPitch + k);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          sum[m][n] = __fmaf_rn(a[m].x, b.x, sum[m][n]);
          sum[m][n] = __fmaf_rn(a[m].y, b.y, sum[m][n]);
          sum[m][n] = __fmaf_rn(a[m].z, b.z, sum[m][n]);
          sum[m][n] = __fmaf_rn(a[m].w, b.w, sum[m][n]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(float* out) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
        out[(threadIdx.x / 16 + m * kRowStep) * GramTile<kTile>::kOutPitch + threadIdx.x % 16 + 16 * n] = sum[m][n];
  }
};

// out[r * kOutPitch + c] = <left[r], right[c]>, in `shared` (GramTile::kShared bytes, 16-byte aligned). `left` and
// `right` are kTile tokens or kNoRow each, in shared memory, written before a barrier of the caller. Only the first
// `columns` columns are computed; the others hold anything. All kThreads threads of the block call it and may read the
// result at once.
template <class T, int kTile, int kThreads>
__device__ __forceinline__ float* gram_tile(const TokenRows& rows, const int* left, const int* right, int columns,
                                            unsigned char* shared) {
  using Tile = GramTile<kTile>;
  static_assert(kThreads >= Tile::kThreads && kTile * kRowCopies % kThreads == 0, "whole rounds of copies");
  constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  const int steps = static_cast<int>((rows.channels + kDepth - 1) / kDepth);
  const int64_t row_bytes = rows.channels * sizeof(T), stride_bytes = rows.stride * sizeof(T);
  const bool copies = rows.aligned && row_bytes % 16 == 0 && stride_bytes >> 32 == 0;
  const int piece = threadIdx.x % kRowCopies * 16;
  const auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % Tile::kStages * Tile::kStageBytes;
      if (copies) {
        const int64_t begin = int64_t(step) * kRowBytes + piece;
        const unsigned char* column = static_cast<const unsigned char*>(rows.data) + begin;
        const auto stride = static_cast<uint32_t>(stride_bytes);
        copy_rows<kTile, kThreads>(column, stride, begin < row_bytes, left, stage);
        copy_rows<kTile, kThreads>(column, stride, begin < row_bytes, right, stage + kTile * kRowPitch);
      } else {
        load_rows<T, kTile>(rows, left, int64_t(step) * kDepth, stage);
        load_rows<T, kTile>(rows, right, int64_t(step) * kDepth, stage + kTile * kRowPitch);
      }
    }
    cp_async_commit();
  };
  const bool computes = threadIdx.x < Tile::kThreads;
  TileProduct<T, kTile> product;
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage is there, and everybody is done with the one that the next copies overwrite
    load(step + Tile::kStages - 1);
    if (computes) product.add(shared + step % Tile::kStages * Tile::kStageBytes, columns);
  }
  cp_async_wait<0>();
  __syncthreads();
  if (computes) product.store(reinterpret_cast<float*>(shared));
  __syncthreads();
  return reinterpret_cast<float*>(shared);
}

// Tiles of a triangle in one dimension: 0 is (0, 0), then (0, 1), (1, 1), (0, 2), ...
__device__ __forceinline__ int2 tile_of(int64_t index) {
  int column = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1) - 1) / 2);
  while (int64_t(column) * (column + 1) / 2 > index) --column;  // the root is rounded
  while (int64_t(column + 1) * (column + 2) / 2 <= index) ++column;
  return {static_cast<int>(index - int64_t(column) * (column + 1) / 2), column};
}

// Part `part` of the channels of rows, of `parts`; the parts begin at whole stages.
template <class T>
__device__ __forceinline__ TokenRows channels_of(const TokenRows& rows, int64_t part, int64_t parts) {
  constexpr int64_t kDepth = kRowBytes / static_cast<int64_t>(sizeof(T));
  const int64_t steps = ceil_div(rows.channels, kDepth), begin = steps * part / parts * kDepth;
  const int64_t end = min(steps * (part + 1) / parts * kDepth, rows.channels);
  return {static_cast<const T*>(rows.data) + begin, rows.stride, end - begin, rows.aligned};
}

// Where the blocks of a cluster have multiplied a part of the channels each: adds up the parts of this block's share of
// the tile's rows, which are kTile / cluster_size() from rank * that on, in the order of the blocks.
template <int kTile>
__device__ __forceinline__ void add_up_parts(float* dots) {
  const uint32_t parts = cluster_size();
  if (parts == 1) return;
  const int own = kTile / parts, first = static_cast<int>(cluster_rank()) * own;
  cluster_sync();
  for (int q = threadIdx.x; q < own * kTile; q += blockDim.x) {
    float* here = dots + (first + q / kTile) * GramTile<kTile>::kOutPitch + q % kTile;
    float sum = *cluster_shared(here, 0);
#pragma unroll 1
    for (uint32_t other = 1; other < parts; ++other) sum += *cluster_shared(here, other);
    *here = sum;  // nobody else reads this block's share of its rows
  }
  cluster_sync();
}

}  // namespace tokenprune
