// Tiles of 64 x 64 dot products: vectors a of operand A against vectors b of operand B. The row pass takes query rows
// as A and keys as B, a column pass keys as A and query rows as B: what belongs to one A vector lies in few lanes.
//
//   global memory --- cp.async, chunks of 128 bytes per vector ---> ring of 3 stages in shared memory (one operand, and
//   the other unless it is resident) --- ldmatrix ---> mma m16n8k16 (float16, bfloat16) or FMA (float32), float32 sums
//   in registers
//
// A block has 4 warps; warp w computes the A vectors 16 w .. 16 w + 15 against all 64 B vectors, 32 sums per thread.
// One barrier per chunk: after it, the chunk loaded two steps ago is there, and the stage read in the last step is
// free for the chunk after next. Loads run ahead over the ends of tiles, so that they overlap with what the caller
// makes of a finished tile.
//
// Shared memory: a chunk of a vector is 8 units of 16 bytes; unit u of vector v lies at unit u ^ (v % 8) of row v. The
// 8 rows that one ldmatrix phase (or 8 neighbouring lanes) reads at the same unit then lie in distinct banks.
// 50 KiB with both operands streamed, 26 KiB + 8 KiB per chunk with one resident.
#pragma once

#include "tokenprune/attention.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// A list of vectors, of which a tile takes 64 from `first` on. The rows of all query heads that share a key head form
// one list: vector v is row v % per_head of head v / per_head. A list of several heads has fewer than 2^31 vectors (the
// binding checks it): a 64-bit division would be a call, around which ptxas spills.
template <class T>
struct VectorList {
  const T* data;
  int64_t count, per_head, head_stride, row_stride;
  bool aligned;

  // Beyond the end the last vector stands for those that do not exist.
  __device__ __forceinline__ const T* vector(int64_t v) const {
    if (v >= count) v = count - 1;
    if (count <= per_head) return data + v * row_stride;
    const uint32_t each = static_cast<uint32_t>(per_head), head = static_cast<uint32_t>(v) / each;
    return data + head * head_stride + (static_cast<uint32_t>(v) - head * each) * row_stride;
  }
};

// All query rows of the heads that share a key head of a sample: query head and row of r are those of a VectorList.
template <class T>
__device__ __forceinline__ VectorList<T> query_rows_of_group(const AttentionProblem& p, int64_t sample,
                                                             int64_t key_head) {
  const VectorStrides& s = p.query_strides;
  const T* data = static_cast<const T*>(p.query) + sample * s.batch + key_head * p.group() * s.head;
  return {data, p.group_rows(), p.rows, s.head, s.row, p.query_aligned};
}

// The query rows of one head.
template <class T>
__device__ __forceinline__ VectorList<T> query_rows_of_head(const AttentionProblem& p, int64_t sample, int64_t head) {
  const VectorStrides& s = p.query_strides;
  return {static_cast<const T*>(p.query) + sample * s.batch + head * s.head, p.rows, p.rows, 0, s.row, p.query_aligned};
}

template <class T>
__device__ __forceinline__ VectorList<T> keys_of_head(const AttentionProblem& p, int64_t sample, int64_t key_head) {
  const VectorStrides& s = p.key_strides;
  return {static_cast<const T*>(p.key) + sample * s.batch + key_head * s.head, p.keys, p.keys, 0, s.row, p.key_aligned};
}

// The last key that causality lets a query row see, in -1 .. keys - 1.
__device__ __forceinline__ int64_t last_visible_key(const AttentionProblem& p, int64_t sample, int64_t row) {
  if (!p.causal) return p.keys - 1;
  const int64_t position =
      p.query_positions == nullptr ? p.keys - p.rows + row : p.query_positions[sample * p.query_positions_stride + row];
  return position < -1 ? -1 : position < p.keys ? position : p.keys - 1;
}

__device__ __forceinline__ bool key_is_unmasked(const AttentionProblem& p, int64_t sample, int64_t key) {
  return p.key_mask == nullptr || p.key_mask[sample * p.key_mask_stride + key];
}

// What a dot product is multiplied with: logit = dot * factor(row) * factor(key), the scale on the row's side.
__device__ __forceinline__ float row_factor(const AttentionProblem& p, int64_t sample, int64_t head, int64_t row) {
  return p.cosine ? p.query_inverse_norms[(sample * p.query_heads + head) * p.rows + row] : 1.0f;
}
__device__ __forceinline__ float key_factor(const AttentionProblem& p, int64_t sample, int64_t key_head, int64_t key) {
  return p.cosine ? p.key_inverse_norms[(sample * p.key_heads + key_head) * p.keys + key] : 1.0f;
}

// A block may be several teams of kTileThreads threads, with a tile each, that pass the same barriers.
__device__ __forceinline__ int tile_thread() { return threadIdx.x % kTileThreads; }
__device__ __forceinline__ int tile_warp() { return tile_thread() / kWarp; }

// One thread's 32 sums of a tile: kThreadA x kThreadB of them, sum (i, j) being that of the tile's vectors a(i) of A
// and b(j) of B. The kLanesPerA lanes that share the same a(i) are neighbours: warp_reduce(x, op, kLanesPerA)
// combines them.
template <class T>
struct DotTile {
  static constexpr bool kMma = sizeof(T) == 2;
  static constexpr int kThreadA = kMma ? 2 : 4, kThreadB = kMma ? 16 : 8, kLanesPerA = kMma ? 4 : 8;
  static constexpr int kUnit = 16 / sizeof(T), kChunk = kChunkBytes / sizeof(T);  // elements

  float sums[8][4];

  __device__ __forceinline__ static int a(int i) {
    return 16 * tile_warp() + lane_id() / kLanesPerA + i * (kWarp / kLanesPerA);
  }
  __device__ __forceinline__ static int b(int j) {
    return kMma ? 8 * (j / 2) + 2 * (lane_id() % 4) + j % 2 : 8 * j + lane_id() % 8;
  }
  // Of the j with the same block(j), b(j) lies in 16 block(j) .. 16 block(j) + 15, for all lanes.
  __host__ __device__ static constexpr int block(int j) { return kMma ? j / 4 : j / 2; }
  __device__ __forceinline__ float& at(int i, int j) { return kMma ? sums[j / 2][2 * i + j % 2] : sums[j][i]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
  }

  // Adds the products of one chunk, of which `left` elements exist (the others are zeros), for the first b_left vectors
  // of B, at most 16 kBlocks. All lanes of a warp call it. Tensor cores truncate what they add, so 32 products start at
  // zero in them, and the ordinary units add those to the sums (docs/kernels.md has the bound).
  template <int kBlocks>
  __device__ __forceinline__ void multiply(const unsigned char* a_chunk, const unsigned char* b_chunk, int left,
                                           int b_left) {
    if constexpr (kMma) {
      if (left >= kChunk)
        multiply_steps<kBlocks, true>(a_chunk, b_chunk, left, b_left);
      else
        multiply_steps<kBlocks, false>(a_chunk, b_chunk, left, b_left);
    } else {
#pragma unroll 1  // unrolled, the reads of several units would spill
      for (int u = 0; u < 8; ++u) {
        if (kUnit * u >= left) break;
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const float4*>(unit(a_chunk, a(i), u));
#pragma unroll
        for (int j = 0; j < 2 * kBlocks; ++j) {
          if (8 * j >= b_left) break;
          const float4 y = *reinterpret_cast<const float4*>(unit(b_chunk, b(j), u));
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float sum = __fmaf_rn(x[i].x, y.x, sums[j][i]);
            sum = __fmaf_rn(x[i].y, y.y, sum);
            sum = __fmaf_rn(x[i].z, y.z, sum);
            sums[j][i] = __fmaf_rn(x[i].w, y.w, sum);
          }
        }
      }
    }
  }

  // Of a whole chunk with kWhole. A lane reads unit 2 k + h of vector r at ((2 k + h) ^ r % 8) << 4 = (h ^ r % 8) << 4 ^
  // k << 5: what depends on the lane is made once. The branches between blocks of B vectors keep the compiler from
  // loading more than the registers hold.
  template <int kBlocks, bool kWhole>
  __device__ __forceinline__ void multiply_steps(const unsigned char* a_chunk, const unsigned char* b_chunk, int left,
                                                 int b_left) {
    constexpr int kSteps = kChunk / 16, kRun = 2;  // of 16 products: a chunk, and between two restarts
    const int lane = lane_id(), a_row = 16 * tile_warp() + lane % 16, b_row = lane / 16 * 8 + lane % 8;
    const unsigned char* const a_at = a_chunk + a_row * kChunkBytes;
    const unsigned char* const b_at = b_chunk + b_row * kChunkBytes;
    const int a_unit = (lane / 16 ^ lane % 8) << 4, b_unit = (lane / 8 % 2 ^ lane % 8) << 4;
#pragma unroll
    for (int first = 0; first < kSteps; first += kRun) {
      if (!kWhole && 16 * first >= left) break;
      uint32_t x[kRun][4];
#pragma unroll
      for (int k = 0; k < kRun; ++k) ldmatrix_x4(x[k], a_at + (a_unit ^ (first + k) << 5));
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (16 * n >= b_left) break;
        float part[2][4] = {};
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (!kWhole && 16 * (first + k) >= left) break;
          uint32_t y[4];
          ldmatrix_x4(y, b_at + 16 * n * kChunkBytes + (b_unit ^ (first + k) << 5));
          const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
          mma_m16n8k16<T>(part[0], x[k], low);
          mma_m16n8k16<T>(part[1], x[k], high);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[2 * n + e / 4][e % 4] += part[e / 4][e % 4];
      }
    }
  }

  __device__ __forceinline__ static const unsigned char* unit(const unsigned char* chunk, int vector, int u) {
    return chunk + vector * kChunkBytes + ((u ^ (vector & 7)) << 4);
  }
};

// Which 64 vectors of a list a tile takes. A list has a count, vector(v) and aligned.
template <class T, class List = VectorList<T>>
struct TileVectors {
  List list;
  int64_t first;

  // How many of the 64 exist.
  __device__ __forceinline__ int present() const {
    const int64_t left = list.count - first;
    return left < 0 ? 0 : left < kTileVectors ? static_cast<int>(left) : kTileVectors;
  }
};

// A thread's part in the copies of a tile's vectors, chunk by chunk: of the vectors tile_thread() / 4 and 32 further,
// the units tile_thread() % 4 and 4 further, odd vectors in reverse order: 8 neighbouring lanes write to distinct banks,
// and 4 read 64 bytes in a row. Vectors that do not exist are copies of one that does.
template <class T>
struct TileCopy {
  using Tile = DotTile<T>;
  const T* vectors[2];  // from the thread's first unit of the next chunk on

  __device__ __forceinline__ static int row() { return tile_thread() / 4; }
  __device__ __forceinline__ static int first_unit() { return tile_thread() % 4 + row() % 2 * 4; }

  template <class List>
  __device__ __forceinline__ void aim(const TileVectors<T, List>& tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) vectors[i] = tile.list.vector(tile.first + row() + 32 * i) + first_unit() * Tile::kUnit;
  }

  // Starts (or, unaligned, makes) the copy of the next chunk, of which `left` elements exist; zeros follow.
  __device__ __forceinline__ void chunk(unsigned char* to, int left, bool aligned) {
    const int at = row() * kChunkBytes + ((first_unit() ^ row() % 8) << 4), half = row() % 2 ? -4 : 4;
    if (aligned && left >= Tile::kChunk) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        cp_async_16(to + (at ^ e / 2 << 6) + e % 2 * 32 * kChunkBytes, vectors[e % 2] + e / 2 * half * Tile::kUnit,
                    true);
    } else {
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        unsigned char* const place = to + (at ^ e / 2 << 6) + e % 2 * 32 * kChunkBytes;
        const T* const source = (e % 2 ? vectors[1] : vectors[0]) + e / 2 * half * Tile::kUnit;
        const int exist = left - (first_unit() + e / 2 * half) * Tile::kUnit;  // from there on
        if (aligned)
          cp_async_16(place, source, exist > 0);
        else
          copy_elements(reinterpret_cast<T*>(place), source, exist);
      }
    }
    vectors[0] += Tile::kChunk;
    vectors[1] += Tile::kChunk;
  }

  __device__ __forceinline__ static void copy_elements(T* to, const T* from, int exist) {
#pragma unroll
    for (int e = 0; e < Tile::kUnit; ++e) to[e] = e < exist ? from[e] : from_float<T>(0.0f);
  }
};

// visit(t, tile) with the finished sums of tile t = 0 .. tiles - 1, those of the vectors kept_of(t) and streamed_of(t).
// Both are functions from t to TileVectors, called again whenever needed. With `resident` the first operand is
// kept_of(0) for all tiles and is read once. It is operand A of the tile, or with kKeptIsB operand B. Of B only the
// first 16 kBlocks vectors are used.
//
// A warp whose A vectors do not exist computes nothing, and sums of vectors that do not exist may be anything, NaN too:
// `visit` must not use them. Every tile has at least one vector of either list. It is called by all threads, may contain barriers, and must not touch `shared`
// (tile_shared_bytes of it). All threads call this function, which may be called repeatedly.
template <class T, bool kKeptIsB = false, int kBlocks = 4, class KeptOf, class StreamedOf, class Visit>
__device__ __forceinline__ void for_each_tile(unsigned char* shared, int dim, bool resident, int tiles,
                                              KeptOf&& kept_of, StreamedOf&& streamed_of, Visit&& visit) {
  constexpr int kChunk = DotTile<T>::kChunk;
  unsigned char* const ring = shared;
  unsigned char* const kept_ring = shared + kTileStages * kChunkTileBytes;  // resident: all chunks
  const int chunks = (dim + kChunk - 1) / kChunk;
  unsigned char* const copies = kept_ring + (resident ? chunks : kTileStages) * kChunkTileBytes;
  int next_tile = 0, next_chunk = 0, next_stage = 0;  // what is loaded next, and to where
  TileCopy<T> streamed_copy;
  TileCopy<T>& kept_copy = reinterpret_cast<TileCopy<T>*>(copies)[tile_thread()];  // of the thread alone: no registers
  const auto load = [&] {
    if (next_tile < tiles) {
      const bool both = !resident || next_tile == 0;
      const int left = dim - next_chunk * kChunk;
      if (next_chunk == 0) {
        streamed_copy.aim(streamed_of(next_tile));
        if (both) kept_copy.aim(kept_of(next_tile));
      }
      streamed_copy.chunk(ring + next_stage * kChunkTileBytes, left, streamed_of(next_tile).list.aligned);
      if (both)
        kept_copy.chunk(kept_ring + (resident ? next_chunk : next_stage) * kChunkTileBytes, left,
                        kept_of(next_tile).list.aligned);
      next_stage = next_stage == kTileStages - 1 ? 0 : next_stage + 1;
      if (++next_chunk == chunks) {
        next_chunk = 0;
        ++next_tile;
      }
    }
    cp_async_commit();
  };
  __syncthreads();  // an earlier call's last reads
#pragma unroll 1
  for (int ahead = 1; ahead < kTileStages; ++ahead) load();
  int stage = 0;
  for (int t = 0; t < tiles; ++t) {
    const int kept = kept_of(resident ? 0 : t).present(), streamed = streamed_of(t).present();
    const bool active = 16 * tile_warp() < (kKeptIsB ? streamed : kept);
    DotTile<T> tile;
    tile.clear();
    for (int c = 0; c < chunks; ++c) {
      cp_async_wait<kTileStages - 2>();
      __syncthreads();
      load();
      const unsigned char* x = kept_ring + (resident ? c : stage) * kChunkTileBytes;
      const unsigned char* y = ring + stage * kChunkTileBytes;
      if (active)
        tile.template multiply<kBlocks>(kKeptIsB ? y : x, kKeptIsB ? x : y, dim - c * kChunk,
                                        kKeptIsB ? kept : streamed);
      stage = stage == kTileStages - 1 ? 0 : stage + 1;
    }
    visit(t, tile);
  }
}

}  // namespace tokenprune
