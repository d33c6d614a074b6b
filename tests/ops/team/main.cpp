// Checks csrc/cpu/team.h by itself; exits with the number of the line of the first check that fails.
#include <cstdio>
#include <numeric>
#include <stdexcept>

#include "cpu/team.h"

#define CHECK(condition)                                       \
  if (!(condition)) {                                          \
    std::printf("line %d failed: %s\n", __LINE__, #condition); \
    std::exit(1);                                              \
  }

using tokenprune::Team;
using tokenprune::with_team;

namespace {

constexpr double kMuch = 1e12;  // multiply-adds: worth every thread

// Steps of many sizes, each of which reads what the step before it wrote: 1 for every element and step.
void steps(int64_t count) {
  std::vector<int64_t> values(1000), copy(1000);
  with_team(kMuch, [&](Team& team) {
    for (int64_t step = 0; step < count; ++step) {
      const int64_t n = 1 + step * 37 % 1000, grain = 1 + step % 5;
      team.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) copy[i] = values[i] + 1;
      });
      for (int64_t i = 0; i < n; ++i) CHECK(copy[i] == values[i] + 1);
      values.swap(copy);
      std::copy(values.begin(), values.begin() + n, copy.begin());
      std::copy(copy.begin() + n, copy.end(), values.begin() + n);
    }
  });
}

// Thrown in a piece, on whichever thread, or between steps: the caller of with_team gets it, and no thread is left.
void exceptions() {
  for (int64_t bad : {0, 17, 99}) {
    bool caught = false;
    try {
      with_team(kMuch, [&](Team& team) {
        team.parallel_for(100, 1, [&](int64_t begin, int64_t end) {
          if (begin <= bad && bad < end) throw std::runtime_error("piece");
        });
        CHECK(!"a step that failed went on");
      });
    } catch (const std::runtime_error& error) {
      caught = std::string(error.what()) == "piece";
    }
    CHECK(caught);
  }
  bool caught = false;
  try {
    with_team(kMuch, [](Team&) { throw std::runtime_error("leader"); });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
}

void few_threads_for_little_work() {
  int64_t pieces = 0;
  with_team(1000, [&](Team& team) { team.parallel_for(100, 1, [&](int64_t, int64_t) { ++pieces; }); });
  CHECK(pieces == 1);
}

}  // namespace

int main(int argc, char**) {
  torch::stable::late = argc > 1;
  steps(500);
  exceptions();
  few_threads_for_little_work();
}
