// Runs grids of threads on the host: every thread of a block (or of a cluster of blocks) is a fiber, and they take
// turns at barriers and warp collectives, in an order that tests choose. See emulator/README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace tokenprune::emulator {

// A kernel did what would hang or be undefined on a GPU.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The order in which the threads of a block (and the blocks of a grid) take their turns.
enum class Schedule { kForward, kReversed, kShuffled };

// What a tensor core does with the bits of a sum that float32 does not have.
enum class MmaRounding { kTruncate, kNearest };

struct Settings {
  Schedule schedule = Schedule::kForward;
  uint64_t seed = 0;  // of kShuffled
  int sm_count = 132;
  int shared_per_block = 227 * 1024;
  int architecture = 90;
  int largest_cluster = 8;  // blocks; fewer where a device is cut into small instances
  bool cooperative = true;  // does the device run grids whose blocks wait for each other?
  // The worst tensor core there is: it adds four products at a time to the accumulator, in as many bits as the largest
  // of the five has in float32. Others keep up to three more and add 8 or 16 products at a time.
  MmaRounding mma_rounding = MmaRounding::kTruncate;
  int mma_extra_bits = 0, mma_group = 4;
  int fail_launch = 0;                  // the n-th launch from now returns an error; 0: none does
  int fail_status = 1;                  // that error: cudaErrorInvalidValue
  std::function<void()> before_launch;  // called once, by the next launch, before the device has seen it
};
Settings& settings();

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  unsigned cluster;
  size_t shared;
  bool cooperative;  // all blocks of the grid run at the same time
  bool dependent;    // starts before the launch in front of it
};

// Launches are asynchronous: what this thread has launched runs when it launches something that does not depend on it,
// and at the latest in finish_launches. `thread` is called once for every thread of the grid. A dependent launch starts
// first, as early as hardware could start it: the one in front of it runs when no thread of the dependent launch's
// first block (or cluster) can go on without.
void submit(const LaunchRecord& launch, std::function<void()> thread);
void finish_launches();

// --- what kernel code asks for, about the thread that is running ---

unsigned char* dynamic_shared();
// Memory of the block, one per `key`; fresh memory is poisoned.
void* static_shared_bytes(const void* key, size_t bytes);

// `site` has a type of its own at every call site and in every instantiation, as __shared__ variables are distinct.
template <class T, class Site>
T& static_shared(const Site&) {
  static const char key = 0;
  return *static_cast<T*>(static_shared_bytes(&key, sizeof(T)));
}

// Barrier of the block; returns the sum of what the threads contributed.
int block_barrier(int contribution);

// All lanes of `mask` wait: each passes a request, the last one to come completes them all. `requests` is indexed by
// lane, null outside the mask. `name` tells collectives apart: lanes that wait in different ones are an error.
using Complete = void (*)(void* const* requests, uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* request, Complete complete);
int lane();

// Copies that are only made when the thread waits for them, as late as the hardware could. Not valid: zeros, but
// `from` is an address all the same.
void enqueue_copy(void* to, const void* from, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(int pending_groups);

unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier();
void* cluster_address(void* pointer, unsigned rank);

void wait_for_launch_before();

// The block adds one to `counter`, in memory, and `blocks` to its `target`, and waits until others have brought the counter
// there, modulo 2^32. Only blocks that run at the same time can.
void group_barrier(uint32_t* counter, uint32_t& target, uint32_t blocks);

}  // namespace tokenprune::emulator
