// Host twins of the functions of tokenprune/ptx.cuh.
#pragma once

#include <cmath>
#include <cstring>

#include "emulator/grid.h"

namespace tokenprune {

namespace emulator {

// sums += left * right, as the tensor core of the settings rounds it (mma.cpp).
void multiply_accumulate(const float (&left)[16][16], const float (&right)[16][8], float (&sums)[16][8]);

}  // namespace emulator

inline int in_register(int x) { return x; }

// See ptx.cuh for which lane holds which element.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Request {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  emulator::warp_collective("mma", 0xFFFFFFFFu, &mine, [](void* const* requests, uint32_t) {
    const auto of = [&](int lane) { return static_cast<Request*>(requests[lane]); };
    const auto half = [](uint32_t pair, int which) {
      T element;
      const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
      std::memcpy(&element, &bits, sizeof bits);
      return to_float(element);
    };
    float left[16][16], right[16][8], sums[16][8];
    const auto each_sum = [&](auto&& visit) {
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r) visit(of(lane)->d[r], sums[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2]);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        for (int r = 0; r < 4; ++r) left[group + r % 2 * 8][pair + r / 2 * 8 + e] = half(of(lane)->a[r], e);
        for (int r = 0; r < 2; ++r) right[pair + r * 8 + e][group] = half(of(lane)->b[r], e);
      }
    }
    each_sum([](float& held, float& sum) { sum = held; });
    emulator::multiply_accumulate(left, right, sums);
    each_sum([](float& held, float& sum) { held = sum; });
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  struct Request {
    uint32_t* r;
    const unsigned char* row;
  } mine{r, static_cast<const unsigned char*>(row)};
  emulator::warp_collective("ldmatrix", 0xFFFFFFFFu, &mine, [](void* const* requests, uint32_t) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const unsigned char* source = static_cast<Request*>(requests[8 * m + lane / 4])->row;
        if (reinterpret_cast<uintptr_t>(source) % 16 != 0) throw emulator::KernelError("ldmatrix: misaligned row");
        std::memcpy(&static_cast<Request*>(requests[lane])->r[m], source + 4 * (lane % 4), 4);
      }
  });
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline void cp_async_16(void* shared, const void* source, bool valid) {
  emulator::enqueue_copy(shared, source, 16, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int pending>
void cp_async_wait() {
  emulator::wait_for_copies(pending);
}

inline void let_next_launch_start() {}  // the next one starts first in any case
inline void wait_for_launch_before() { emulator::wait_for_launch_before(); }

inline void group_sync(uint32_t* counter, uint32_t& target, uint32_t blocks) {
  emulator::group_barrier(counter, target, blocks);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline uint32_t cluster_size() { return emulator::cluster_size(); }
inline void cluster_sync() { emulator::cluster_barrier(); }
template <class T>
T* cluster_shared(T* pointer, uint32_t rank) {
  return static_cast<T*>(emulator::cluster_address(pointer, rank));
}

}  // namespace tokenprune
