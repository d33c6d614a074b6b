// Stands in for torch's thread pool: its threads can be made to come late.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t threads = 4;
inline bool late = false;  // the others come only after the first one has ended

inline uint32_t get_num_threads() { return threads; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> others;
  const auto start_others = [&] {
    for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&f, i] { f(i, i + 1); });
  };
  if (!late) start_others();
  f(begin, begin + 1);
  if (late) start_others();
  for (std::thread& other : others) other.join();
}

}  // namespace torch::stable
