// Dot products of feature rows for spatial_semantic_nms, one warp at a time, straight from global memory.
//
// Every product of two rows is summed in the same order, whichever kernel asks, so that rows with equal bits get equal
// weights and a pick's weights do not depend on whether its list was made in advance. The order: the row is cut into
// kSegments segments for as many warps; a segment's sum is the sum of its chunks of kChunk elements, each accumulated
// from zero. Short chunks matter for float16 and bfloat16: tensor cores truncate where they accumulate, and a narrow
// sigma_semantic magnifies the error of a cosine. float32 rows use plain FMAs.
#pragma once

#include "tokenprune/ptx.cuh"
#include "tokenprune/warp.cuh"

namespace tokenprune {

constexpr int kSegments = 4, kChunk = 32, kStep = 32;
constexpr int kDotColumns = 32;  // columns of one warp

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
struct alignas(16) Vector {
  T lane[kVector<T>];
};

// Elements k, k + 1, ... of a row, zeros from `end` on. `wide`: 16-byte loads are aligned. `whole`: they are, and all
// of the elements exist.
template <bool whole, class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t k, int64_t end, bool wide) {
  Vector<T> v;
  if (whole || (wide && k + kVector<T> <= end)) {
    const uint4 words = *reinterpret_cast<const uint4*>(row + k);
    std::memcpy(&v, &words, sizeof v);
  } else {
    const int left = static_cast<int>(max(min(end - k, static_cast<int64_t>(kVector<T>)), static_cast<int64_t>(0)));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) v.lane[i] = i < left ? row[k + i] : from_float<T>(0.0f);
  }
  return v;
}

template <class T>
__device__ __forceinline__ bool wide_rows(const T* base, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(base) | static_cast<uintptr_t>(stride * static_cast<int64_t>(sizeof(T)))) % 16 ==
         0;
}

// The elements [begin, end) of a row that make up a segment.
struct Segment {
  int64_t begin, end;
};

__device__ __forceinline__ Segment segment_of(int which, int64_t dim) {
  const int64_t length = round_up(ceil_div<int64_t>(dim, kSegments), int64_t(kStep));
  const int64_t begin = min(which * length, dim);
  return {begin, min(begin + length, dim)};
}

__device__ __forceinline__ float sum_of_segments(const float (&s)[kSegments]) { return (s[0] + s[1]) + (s[2] + s[3]); }

// body(part, begin, end, whole) over the chunks of a segment; part is added to the sums after each of them. `whole` is
// a type: the chunk has kChunk elements and is aligned.
template <int count, class Body>
__device__ __forceinline__ void in_chunks(float (&sums)[count], Segment segment, bool wide, Body&& body) {
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i] = 0;
  for (int64_t begin = segment.begin; begin < segment.end; begin += kChunk) {
    float part[count] = {};
    if (wide && begin + kChunk <= segment.end) {
      body(part, begin, begin + kChunk, std::true_type());
    } else {
      body(part, begin, min(begin + kChunk, segment.end), std::false_type());
    }
#pragma unroll
    for (int i = 0; i < count; ++i) sums[i] += part[i];
  }
}

// Eight elements as the registers of two tensor-core products.
template <bool whole, class T>
__device__ __forceinline__ uint4 load_words(const T* row, int64_t k, int64_t end, bool wide) {
  const Vector<T> v = load_vector<whole>(row, k, end, wide);
  uint4 words;
  std::memcpy(&words, &v, sizeof words);
  return words;
}

// sum += the products of 32 elements of 16 rows (low: rows g, high: rows g + 8) with those of 8 columns. The tensor
// core may sum over k in any assignment of elements to its k positions, as long as rows and columns agree: here each
// lane's share are 8 neighbouring elements, one 16-byte load for two instructions.
template <class T>
__device__ __forceinline__ void multiply_step(float (&sum)[4], uint4 low, uint4 high, uint4 column) {
  const uint32_t a_first[4] = {low.x, high.x, low.y, high.y}, a_second[4] = {low.z, high.z, low.w, high.w};
  const uint32_t b_first[2] = {column.x, column.y}, b_second[2] = {column.z, column.w};
  mma_m16n8k16<T>(sum, a_first, b_first);
  mma_m16n8k16<T>(sum, a_second, b_second);
}

// The segment's share of the products of 16 rows with 32 columns. row(r) and column(c) are pointers to feature rows;
// put(r, c, x, y) gets the products of row r with the columns c and c + 1, c even: lane (g, t) = (lane / 4, lane % 4)
// those of rows g and g + 8 with columns 8j + 2t, j < 4, as mma_m16n8k16 leaves them.
template <class T, class Row, class Column, class Put>
__device__ __forceinline__ void warp_dots(Row&& row, Column&& column, Segment segment, bool wide, Put&& put) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const T* const rows[2] = {row(g), row(g + 8)};
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll 1
    for (int j = 0; j < 4; ++j) {
      const int c = 8 * j + 2 * t;
      const T* const columns[2] = {column(c), column(c + 1)};
      float sums[4];
      in_chunks(sums, segment, wide, [&](float (&part)[4], int64_t begin, int64_t end, auto whole) {
#pragma unroll 2
        for (int64_t k = begin; k < end; k += kVector<T>) {
          Vector<T> a[2], b[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            a[i] = load_vector<whole.value>(rows[i], k, end, wide);
            b[i] = load_vector<whole.value>(columns[i], k, end, wide);
          }
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i)
#pragma unroll
            for (int pair = 0; pair < 4; ++pair)
              part[pair] = fmaf(a[pair / 2].lane[i], b[pair % 2].lane[i], part[pair]);
        }
      });
      put(g, c, sums[0], sums[1]);
      put(g + 8, c, sums[2], sums[3]);
    }
  } else {
    const T* columns[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j] = column(8 * j + g);
    float sums[16];
    in_chunks(sums, segment, wide, [&](float (&part)[16], int64_t begin, int64_t end, auto whole) {
      float sum[4][4] = {};
      if constexpr (whole.value) {
#pragma unroll 1
        for (int64_t k = begin + kVector<T> * t; k < end; k += kStep) {
          const uint4 low = load_words<true>(rows[0], k, end, wide), high = load_words<true>(rows[1], k, end, wide);
#pragma unroll
          for (int j = 0; j < 4; ++j) multiply_step<T>(sum[j], low, high, load_words<true>(columns[j], k, end, wide));
        }
      } else {
        // One group of columns after the other, because the careful loads take many registers.
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll 1
          for (int64_t k = begin; k < end; k += kStep) {
            const int64_t mine = k + kVector<T> * t;
            multiply_step<T>(sum[j], load_words<false>(rows[0], mine, end, wide),
                             load_words<false>(rows[1], mine, end, wide),
                             load_words<false>(columns[j], mine, end, wide));
          }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) part[i] = sum[i / 4][i % 4];
    });
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      put(g, 8 * j + 2 * t, sums[4 * j], sums[4 * j + 1]);
      put(g + 8, 8 * j + 2 * t, sums[4 * j + 2], sums[4 * j + 3]);
    }
  }
}

// The segment's share of the products of one row with 32 columns, bit for bit as warp_dots has it: put(c, product).
template <class T, class Column, class Put>
__device__ __forceinline__ void warp_dots_of_one(const T* row, Column&& column, Segment segment, bool wide, Put&& put) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const T* const mine = column(lane_id());
    float sum[1];
    in_chunks(sum, segment, wide, [&](float (&part)[1], int64_t begin, int64_t end, auto whole) {
#pragma unroll 2
      for (int64_t k = begin; k < end; k += kVector<T>) {
        const Vector<T> a = load_vector<whole.value>(row, k, end, wide);
        const Vector<T> b = load_vector<whole.value>(mine, k, end, wide);
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) part[0] = fmaf(a.lane[i], b.lane[i], part[0]);
      }
    });
    put(lane_id(), sum[0]);
  } else {
    // All 16 rows are the same one: the first of them has the result.
    const auto put_first = [&](int r, int c, float x, float y) {
      if (r != 0) return;
      put(c, x);
      put(c + 1, y);
    };
    warp_dots<T>([&](int) { return row; }, column, segment, wide, put_first);
  }
}

}  // namespace tokenprune
