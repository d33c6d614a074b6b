// The launch that is running: its blocks, their threads, and what these wait for.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/grid.h"

namespace tokenprune::emulator {

constexpr int kWarp = 32;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating type, -1 as an integer

enum class State { kReady, kBlockBarrier, kClusterBarrier, kCounter, kLaunchBefore, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  int group;
};

struct Block;

struct Thread {
  uint3 index;
  int lane;
  size_t warp;
  Block* block;
  Fiber* fiber;
  State state = State::kReady;
  int barrier_result = 0;
  std::vector<Copy> copies;
  int copy_group = 0;
  const uint32_t* counter = nullptr;  // of group_barrier
  uint32_t target = 0;
  bool waited = false;  // for the launch before
};

// Waiting lanes: several groups of one warp can be on their way at the same time when their masks are disjoint.
struct Collective {
  const char* name;
  uint32_t mask, arrived = 0;
  void* requests[kWarp] = {};
};

struct Block {
  uint3 index;
  unsigned rank;
  size_t cluster;  // the block of its cluster that is first among the running ones
  std::unique_ptr<unsigned char[]> dynamic;
  size_t dynamic_bytes;
  struct Static {
    const void* key;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
  };
  std::vector<Static> statics;
  std::vector<Thread> threads;
  std::vector<std::vector<Collective>> collectives;  // by warp
  size_t at_barrier = 0, ended = 0;
  // In the first block of a cluster: threads at its barrier, and the barriers that it has passed.
  size_t at_cluster_barrier = 0, cluster_barriers = 0;
  size_t mapped_after = 0;  // how many barriers it had passed when another block last asked for an address in this one
  int contributions = 0;
};

struct Submitted {
  LaunchRecord launch;
  std::function<void()> thread;
};
using Chain = std::vector<Submitted>;  // all but the first are dependent

struct Running {
  const LaunchRecord* launch = nullptr;
  Chain* before = nullptr;                     // the launches in front, until they have run
  std::vector<std::unique_ptr<Block>> blocks;  // at the same time: of one cluster, or all of a cooperative launch
  Thread* thread = nullptr;
  std::exception_ptr failure;
};

extern Running running;

// The thread whose turn it is.
Thread& current();
std::string describe(const uint3& at);
[[noreturn]] void fail(const Thread& t, const std::string& what);
// Ends the turn of the current thread, until somebody makes it ready again.
void wait(State state);
// Makes the threads ready that wait for this.
void release(Block& block, State from);
std::unique_ptr<unsigned char[]> poisoned(size_t bytes);

}  // namespace tokenprune::emulator
