// Threads for an algorithm of many short parallel steps with serial work in between.
//
// parallel_for ends every step at a barrier of all threads. Where other processes want the cores too, one of the
// threads is usually off its core, and each step then lasts until the scheduler brings it back: milliseconds for
// microseconds of work. In a team one thread leads and the others help as far as they get there: a step lasts until
// every piece that somebody took is done, and the leader can take all of them. Only the end of the whole algorithm
// waits for everybody.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>

#include "parallel.h"

namespace tokenprune {

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t threads() const { return threads_; }

  // f(begin, end) over pieces of [0, n), at least `grain` each, by the leader and whoever else has time. An exception
  // of f is thrown here once no piece runs any more.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, const F& f) {
    constexpr int64_t kPiecesPerThread = 4;  // a thread that is slow, or off its core, leaves its share to the others
    if (n <= 0) return;
    if (n <= grain || threads_ == 1) return f(int64_t(0), n);
    size_ = std::max((n + kPiecesPerThread * threads_ - 1) / (kPiecesPerThread * threads_), grain);
    total_ = n;
    context_ = &f;
    call_ = [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
    const int64_t pieces = (n + size_ - 1) / size_;
    done_.store(0, std::memory_order_relaxed);
    open_.store(pieces, std::memory_order_release);  // whoever takes a piece sees all of the above
    while (help()) continue;
    while (done_.load(std::memory_order_acquire) != pieces) sched_yield();  // to those that run the last pieces
    if (failed_) std::rethrow_exception(failed_);
  }

  // What the threads other than the leader do, until the leader ends it.
  void follow() {
    while (!over_.load(std::memory_order_acquire))
      if (!help()) sched_yield();
  }

  // What the leader calls last, whatever happens: followers wait for it.
  void end() { over_.store(true, std::memory_order_release); }

 private:
  // Runs a piece if one is left. A step stays as it is until all of its pieces are done, so that taking a piece, the
  // last one first, is all that must be atomic.
  bool help() {
    int64_t left = open_.load(std::memory_order_relaxed);
    do {
      if (left == 0) return false;
    } while (!open_.compare_exchange_weak(left, left - 1, std::memory_order_acquire, std::memory_order_relaxed));
    const int64_t begin = (left - 1) * size_;
    try {
      call_(context_, begin, std::min(begin + size_, total_));
    } catch (...) {
      if (!failing_.test_and_set()) failed_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  const int64_t threads_;
  // The present step.
  int64_t size_ = 0, total_ = 0;
  const void* context_ = nullptr;
  void (*call_)(const void*, int64_t, int64_t) = nullptr;
  alignas(64) std::atomic<int64_t> open_{0};  // pieces that no thread has taken
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> over_{false};
  std::atomic_flag failing_ = ATOMIC_FLAG_INIT;
  std::exception_ptr failed_;
};

// lead(team) on this thread with as many helpers as `work` multiply-adds are worth.
template <class F>
void with_team(double work, const F& lead) {
  constexpr double kWorthAThread = 1 << 27;  // some 8 ms: under load the end waits about as long for all threads
  Team team(1 + static_cast<int64_t>(std::min(work / kWorthAThread, torch::stable::get_num_threads() - 1.0)));
  parallel_for(team.threads(), 1, [&](int64_t begin, int64_t) {
    if (begin != 0) return team.follow();
    try {
      lead(team);
    } catch (...) {
      team.end();
      throw;
    }
    team.end();
  });
}

// f(sample, team) for every sample of a batch, each worth `work` multiply-adds: side by side when they keep the threads
// busy, else one after the other, all threads on one.
template <class F>
void over_samples_in_teams(int64_t batch, double work, const F& f) {
  if (batch >= torch::stable::get_num_threads()) {
    parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
      Team alone(1);
      for (int64_t b = begin; b < end; ++b) f(b, alone);
    });
  } else {
    with_team(batch * work, [&](Team& team) {
      for (int64_t b = 0; b < batch; ++b) f(b, team);
    });
  }
}

}  // namespace tokenprune
