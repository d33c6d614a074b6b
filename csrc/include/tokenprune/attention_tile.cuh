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

#include <cfloat>

#include "tokenprune/attention.h"
#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

// A tile takes 64 vectors of a list, of which `present` exist: beyond them the last one stands for those that do not.
__device__ __forceinline__ int tile_present(int64_t left) {
  return left < 0 ? 0 : left < kTileVectors ? static_cast<int>(left) : kTileVectors;
}

// Vectors of one head that follow each other. The product of an unsigned number and the stride costs half as much.
template <class T>
struct HeadVectors {
  const T* data;  // the first of the list
  int64_t row_stride;
  int first, last;  // of the tile, of the list
  int present;
  bool aligned;

  __device__ __forceinline__ const T* vector(int v) const {
    const int at = first + v;
    return data + static_cast<uint32_t>(at < last ? at : last) * row_stride;
  }
};

// The rows of all query heads that share a key head form one list: its vector v is row v % per_head of head
// v / per_head. A list of several heads has fewer than 2^31 vectors (the binding checks it): a 64-bit division would be
// a call, around which ptxas spills.
template <class T>
struct GroupVectors {
  const T* data;  // the first of the list
  int64_t first;  // of the tile, in the list
  int64_t per_head, head_stride, row_stride;
  bool several_heads;
  int present;
  bool aligned;

  __device__ __forceinline__ const T* vector(int v) const {
    const int64_t at = first + (v < present ? v : present - 1);
    if (!several_heads) return data + at * row_stride;
    const uint32_t each = static_cast<uint32_t>(per_head), head = static_cast<uint32_t>(at) / each;
    return data + head * head_stride + (static_cast<uint32_t>(at) - head * each) * row_stride;
  }
};

// Of all query rows of the heads that share a key head of a sample, those from `first` on.
template <class T>
__device__ __forceinline__ GroupVectors<T> query_rows_of_group(const AttentionProblem& p, int64_t sample,
                                                               int64_t key_head, int64_t first) {
  const VectorStrides& s = p.query_strides;
  const T* data = static_cast<const T*>(p.query) + sample * s.batch + key_head * p.group() * s.head;
  return {data, first, p.rows, s.head, s.row, p.group() > 1, tile_present(p.group_rows() - first), p.query_aligned};
}

// The query rows [first, end) of one head.
template <class T>
__device__ __forceinline__ HeadVectors<T> query_rows_of_head(const AttentionProblem& p, int64_t sample, int64_t head,
                                                             int64_t first, int64_t end) {
  const VectorStrides& s = p.query_strides;
  const int present = tile_present(end - first);
  return {static_cast<const T*>(p.query) + sample * s.batch + head * s.head + first * s.row,
          s.row,
          0,
          present - 1,
          present,
          p.query_aligned};
}

// The first key of a head.
template <class T>
__device__ __forceinline__ const T* keys_of_head(const AttentionProblem& p, int64_t sample, int64_t key_head) {
  return static_cast<const T*>(p.key) + sample * p.key_strides.batch + key_head * p.key_strides.head;
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
// Of cosines alone; by_key_norm applies it.
__device__ __forceinline__ float key_factor(const AttentionProblem& p, int64_t sample, int64_t key_head, int64_t key) {
  return p.key_inverse_norms[(sample * p.key_heads + key_head) * p.keys + key];
}
// Where the squares of finite elements overflow, a factor is 0, and the dot product may be infinite or inf - inf: a
// finite one instead makes 0 of it, or the other vector's NaN.
__device__ __forceinline__ float by_key_norm(float dot, float factor) {
  return fminf(fmaxf(dot, -FLT_MAX), FLT_MAX) * factor;
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

  // Where a lane reads 16 elements of a chunk from, of the warp's A vectors and of 16 B vectors: units 2 k and 2 k + 1.
  struct Fragments {
    int a[4], b[4];

    __device__ __forceinline__ Fragments() {
      const int lane = lane_id(), a_row = 16 * tile_warp() + lane % 16, b_row = lane / 16 * 8 + lane % 8;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        a[k] = in_register(a_row * kChunkBytes + (((2 * k + lane / 16) ^ lane % 8) << 4));
        b[k] = b_row * kChunkBytes + (((2 * k + lane / 8 % 2) ^ lane % 8) << 4);
      }
    }
  };

  // Tensor cores truncate what they add. The products of whole chunks are added up there as far as the first 128; later
  // 32 products at a time start at zero in them, and the ordinary units add those to the sums (docs/kernels.md has the
  // bound). So many elements of a vector are in the first run:
  template <int kBlocks>
  __device__ __forceinline__ static int first_run(int dim, int b_left) {
    return b_left <= 16 * (kBlocks - 1) ? 0 : min(dim / kChunk * kChunk, 128);
  }

  // Adds the products of a chunk, of which `left` elements exist (the others are zeros), for the first b_left vectors of
  // B, at most 16 kBlocks. All lanes of a warp call it.
  template <int kBlocks>
  __device__ __forceinline__ void multiply(const Fragments& at, const unsigned char* a_chunk,
                                           const unsigned char* b_chunk, int left, int b_left,
                                           bool in_first_run = false) {
    if constexpr (kMma) {
      if (in_first_run)
        multiply_steps<kBlocks, true, false>(at, a_chunk, b_chunk, left, b_left);
      else if (left >= kChunk)
        multiply_steps<kBlocks, true, true>(at, a_chunk, b_chunk, left, b_left);
      else
        multiply_steps<kBlocks, false, true>(at, a_chunk, b_chunk, left, b_left);
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

  // Of a whole chunk with kWhole; of all vectors of B and without kRestart. With restarts, the branches between blocks of
  // B vectors keep the compiler from loading more than the registers hold.
  template <int kBlocks, bool kWhole, bool kRestart>
  __device__ __forceinline__ void multiply_steps(const Fragments& at, const unsigned char* a_chunk,
                                                 const unsigned char* b_chunk, int left, int b_left) {
    constexpr int kSteps = kChunk / 16, kRun = kRestart ? 2 : 1;
#pragma unroll
    for (int first = 0; first < kSteps; first += kRun) {
      uint32_t x[kRun][4];
#pragma unroll
      for (int k = 0; k < kRun; ++k) ldmatrix_x4(x[k], a_chunk + at.a[first + k]);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (kRestart && 16 * n >= b_left) break;
        float part[2][4] = {};
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (!kWhole && 16 * (first + k) >= left) break;
          uint32_t y[4];
          ldmatrix_x4(y, b_chunk + 16 * n * kChunkBytes + at.b[first + k]);
          const uint32_t low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
          mma_m16n8k16<T>(kRestart ? part[0] : sums[2 * n], x[k], low);
          mma_m16n8k16<T>(kRestart ? part[1] : sums[2 * n + 1], x[k], high);
        }
        if constexpr (kRestart)
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[2 * n + e / 4][e % 4] += part[e / 4][e % 4];
      }
    }
  }

  __device__ __forceinline__ static const unsigned char* unit(const unsigned char* chunk, int vector, int u) {
    return chunk + vector * kChunkBytes + ((u ^ (vector & 7)) << 4);
  }
};

// A thread's part in the copies of a tile's vectors, chunk by chunk: of the vectors row() and 32 further, the units
// tile_thread() % 4 and 4 further. Of 8 neighbouring lanes 4 read 64 bytes in a row, and 4 the same of the vector 4
// further: swizzled, they write to distinct banks. Vectors that do not exist are copies of one that does.
template <class T>
struct TileCopy {
  using Tile = DotTile<T>;
  const T* vectors[2];  // from the thread's first unit of the next chunk on

  __device__ __forceinline__ static int row() {
    const int number = tile_thread() / 4;
    return (number & 26) | (number & 1) << 2 | (number >> 2 & 1);
  }
  __device__ __forceinline__ static int first_unit() { return tile_thread() % 4; }

  template <class List>
  __device__ __forceinline__ void aim(const List& list) {
#pragma unroll
    for (int i = 0; i < 2; ++i) vectors[i] = list.vector(row() + 32 * i) + first_unit() * Tile::kUnit;
  }

  // Where the thread's first unit of a chunk goes.
  __device__ __forceinline__ static int place() { return row() * kChunkBytes + ((first_unit() ^ row() % 8) << 4); }

  // Starts (or, unaligned, makes) the copy of the next chunk, of which `left` elements exist, if any; zeros follow. It
  // goes to `shared`, with the thread's place at `at`.
  __device__ __forceinline__ void chunk(unsigned char* shared, int at, int left, bool aligned) {
    if (aligned && left >= Tile::kChunk) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        cp_async_16(shared + (at ^ e / 2 << 6) + e % 2 * 32 * kChunkBytes, vectors[e % 2] + e / 2 * 4 * Tile::kUnit,
                    true);
    } else if (left > 0) {
      const int64_t apart = vectors[1] - vectors[0];
#pragma unroll 1
      for (int e = 0; e < 4; ++e) {
        unsigned char* const to = shared + (at ^ e / 2 << 6) + e % 2 * 32 * kChunkBytes;
        const T* const source = vectors[0] + e % 2 * apart + e / 2 * 4 * Tile::kUnit;
        const int exist = left - (first_unit() + e / 2 * 4) * Tile::kUnit;  // from there on
        if (aligned)
          cp_async_16(to, source, exist > 0);
        else
          copy_elements(reinterpret_cast<T*>(to), source, exist);
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
// Both are functions from t to 64 vectors of a list, called again whenever needed. With `resident` the first operand is
// kept_of(0) for all tiles and is read once. It is operand A of the tile, or with kKeptIsB operand B. Of B only the
// first 16 kBlocks vectors are used. With kVote the compiler knows that a warp stays together: 8 instructions of a chunk
// less, for a register more.
//
// A warp whose A vectors do not exist computes nothing, and sums of vectors that do not exist may be anything, NaN too:
// `visit` must not use them. Every tile has at least one vector of either list. It is called by all threads, may contain
// barriers, and must not touch `shared` (tile_shared_bytes of it). All threads call this function, which may be called
// repeatedly.
template <class T, bool kKeptIsB = false, int kBlocks = 4, bool kVote = true, class KeptOf, class StreamedOf,
          class Visit>
__device__ __forceinline__ void for_each_tile(unsigned char* shared, int dim, bool resident, int tiles,
                                              KeptOf&& kept_of, StreamedOf&& streamed_of, Visit&& visit) {
  constexpr int kChunk = DotTile<T>::kChunk;
  unsigned char* const ring = shared;
  unsigned char* const kept_ring = shared + kTileStages * kChunkTileBytes;  // resident: all chunks
  const typename DotTile<T>::Fragments fragments;
  const int place = in_register(TileCopy<T>::place());
  TileCopy<T> streamed_copy;
  // Of the thread alone, in shared memory: no registers.
  TileCopy<T>& kept_copy = reinterpret_cast<TileCopy<T>*>(kept_ring + kTileStages * kChunkTileBytes)[tile_thread()];
  const auto aim = [&](int t) {
    streamed_copy.aim(streamed_of(t));
    if (resident) return;
    TileCopy<T> copy;
    copy.aim(kept_of(t));
    kept_copy = copy;
  };
  int next_tile = 0, next_left = tiles > 0 ? dim : 0;  // of what is loaded next, if anything is left
  const auto load = [&](int stage) {
    streamed_copy.chunk(ring, stage + place, next_left, streamed_of(next_tile).aligned);
    if (!resident) {
      TileCopy<T> copy = kept_copy;
      copy.chunk(kept_ring, stage + place, next_left, kept_of(next_tile).aligned);
      kept_copy = copy;
    }
    cp_async_commit();
    next_left -= kChunk;
    if (next_left <= 0 && ++next_tile < tiles) {
      next_left = dim;
      aim(next_tile);
    }
  };
  __syncthreads();  // an earlier call's last reads
  if (tiles > 0) aim(0);
  if (resident && tiles > 0) {
    const auto kept = kept_of(0);
    TileCopy<T> copy;
    copy.aim(kept);
    int at = place;
#pragma unroll 1
    for (int left = dim; left > 0; left -= kChunk, at += kChunkTileBytes) copy.chunk(kept_ring, at, left, kept.aligned);
  }
  int stage = 0, freed = (kTileStages - 1) * kChunkTileBytes;
#pragma unroll 1
  for (int ahead = 0; ahead < freed; ahead += kChunkTileBytes) load(ahead);
  for (int t = 0; t < tiles; ++t) {
    const int kept = kept_of(resident ? 0 : t).present, streamed = streamed_of(t).present;
    const bool exists = 16 * tile_warp() < (kKeptIsB ? streamed : kept);
    const bool active = kVote ? __any_sync(kAllLanes, exists) : exists;
    const int b_left = kKeptIsB ? kept : streamed;
    int run = DotTile<T>::template first_run<kBlocks>(dim, b_left);
    DotTile<T> tile;
    tile.clear();
    const unsigned char* x = kept_ring;
    int left = dim;
    do {
      cp_async_wait<kTileStages - 2>();
      __syncthreads();
      load(freed);
      const unsigned char* y = ring + stage;
      if (!resident) x = kept_ring + stage;
      if (active) tile.template multiply<kBlocks>(fragments, kKeptIsB ? y : x, kKeptIsB ? x : y, left, b_left, run > 0);
      if (resident) x += kChunkTileBytes;
      static_assert(kTileStages == 3);
      const int next = 3 * kChunkTileBytes - stage - freed;  // the third of 0, 1 and 2 chunks
      freed = stage;
      stage = next;
      left -= kChunk;
      run -= kChunk;
    } while (left > 0);
    visit(t, tile);
  }
}

}  // namespace tokenprune
