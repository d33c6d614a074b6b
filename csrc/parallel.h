// Work sharing through torch's own thread pool. Results must not depend on how many threads there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace tokenprune {

// f(begin, end) over pieces of [0, n); runs inline when one piece of `grain` covers it. What f throws, as when there is
// no memory, reaches the caller: torch's own loop would tell it that something failed, but not what.
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t(0), n);
    return;
  }
  std::exception_ptr thrown;
  std::atomic_flag taken = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (...) {
      if (!taken.test_and_set()) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace tokenprune
