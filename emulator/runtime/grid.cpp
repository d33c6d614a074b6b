#include "emulator/grid.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "emulator/fiber.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace tokenprune::emulator {

namespace {

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
  std::vector<std::vector<Collective>> collectives;          // by warp
  size_t at_barrier = 0, ended = 0, at_cluster_barrier = 0;  // the last one counts in the first block of a cluster
  int contributions = 0;
};

// Exactly as many bytes as asked for, so that AddressSanitizer sees the first byte past the end.
std::unique_ptr<unsigned char[]> poisoned(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::memset(memory.get(), kPoison, bytes);
  return memory;
}

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

Running running;
// By how many dependent launches wait meanwhile. Kept from launch to launch: making a stack is slow.
std::map<size_t, std::vector<std::unique_ptr<Fiber>>> fibers_of;
size_t waiting_launches = 0;
thread_local Chain submitted;

void run_chain(Chain& chain);

Thread& current() {
  if (running.thread == nullptr) throw KernelError("device code runs outside a kernel");
  return *running.thread;
}

std::string describe(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

[[noreturn]] void fail(const Thread& t, const std::string& what) {
  throw KernelError("kernel " + running.launch->kernel + ", block " + describe(t.block->index) + ", thread " +
                    describe(t.index) + ": " + what);
}

void wait(State state) {
  Thread& t = current();
  t.state = state;
  t.fiber->suspend();
}

std::string deadlock() {
  size_t counts[7] = {};
  for (const auto& block : running.blocks)
    for (const Thread& t : block->threads) ++counts[static_cast<int>(t.state)];
  std::string text = "kernel " + running.launch->kernel + " cannot go on: of the threads of block " +
                     describe(running.blocks.front()->index);
  if (running.blocks.size() > 1) text += running.launch->cooperative ? " and all others" : " and its cluster";
  const char* names[] = {"wait at a block barrier",    "wait at a cluster barrier", "wait for other blocks",
                         "wait for the launch before", "wait in a warp collective", "have ended"};
  for (int i = 0; i < 6; ++i) text += (i > 0 ? ", " : " ") + std::to_string(counts[i + 1]) + " " + names[i];
  return text;
}

// The order of `n` things; shuffled orders differ from call to call.
void reorder(std::vector<size_t>& order, size_t n, std::mt19937_64& random) {
  if (order.size() != n) {
    order.resize(n);
    std::iota(order.begin(), order.end(), size_t(0));
    if (settings().schedule == Schedule::kReversed) std::reverse(order.begin(), order.end());
  }
  if (settings().schedule == Schedule::kShuffled) std::shuffle(order.begin(), order.end(), random);
}

// The shared memory of a block that has ended belongs to no block: a thread that still reads it reads poison.
void forget(Block& block) {
  std::memset(block.dynamic.get(), kPoison, block.dynamic_bytes);
  for (Block::Static& s : block.statics) std::memset(s.memory.get(), kPoison, s.bytes);
}

// Gives a thread its turn. True once it has ended.
bool resume(Thread& t) {
  running.thread = &t;
  threadIdx = t.index;
  blockIdx = t.block->index;
  const bool ended = t.fiber->resume();
  running.thread = nullptr;
  if (running.failure) std::rethrow_exception(running.failure);
  if (ended) {
    t.state = State::kDone;
    if (++t.block->ended == t.block->threads.size()) forget(*t.block);
  }
  return ended;
}

// How many turns a warp gets before the next one does: forward and reversed as many as it can take.
uint64_t turns_of_a_warp(std::mt19937_64& random) {
  if (settings().schedule != Schedule::kShuffled || random() % 4 == 0) return UINT64_MAX;
  return 1 + random() % 6;
}

void release(Block& block, State from) {
  for (Thread& t : block.threads)
    if (t.state == from) t.state = State::kReady;
}

// Runs the launches in front, for which all threads wait that are left. False if there are none.
bool run_launches_before() {
  if (running.before == nullptr || running.before->empty()) return false;
  Running mine = std::exchange(running, Running());
  ++waiting_launches;
  run_chain(*mine.before);
  --waiting_launches;
  running = std::move(mine);
  running.before = nullptr;
  blockDim = running.launch->block;
  gridDim = running.launch->grid;
  for (const auto& block : running.blocks) release(*block, State::kLaunchBefore);
  return true;
}

// Warps run ahead of each other as far as barriers let them, so that a barrier too few shows: the first warp writes
// what the last one has not read yet, or reads what it has not written.
void run_blocks(const std::function<void()>& guarded, std::mt19937_64& random) {
  std::vector<std::vector<Thread*>> warps;
  auto& fibers = fibers_of[waiting_launches];
  size_t count = 0;
  for (const auto& block : running.blocks)
    for (Thread& t : block->threads) {
      if (t.lane == 0) warps.emplace_back();
      warps.back().push_back(&t);
      if (fibers.size() == count) fibers.push_back(std::make_unique<Fiber>());
      t.fiber = fibers[count++].get();
      t.fiber->start(&guarded);
    }
  std::vector<size_t> order, lanes;
  for (size_t done = 0; done < count;) {
    bool moved = false;
    reorder(order, warps.size(), random);
    for (size_t w : order) {
      bool going = true;
      for (uint64_t turns = turns_of_a_warp(random); going && turns > 0; --turns) {
        going = false;
        reorder(lanes, warps[w].size(), random);
        for (size_t i : lanes) {
          Thread& t = *warps[w][i];
          if (t.state == State::kCounter && static_cast<int32_t>(*t.counter - t.target) >= 0) t.state = State::kReady;
          if (t.state != State::kReady) continue;
          going = moved = true;
          if (resume(t)) ++done;
        }
      }
    }
    if (!moved && !run_launches_before()) throw KernelError(deadlock());
  }
}

std::unique_ptr<Block> make_block(const LaunchRecord& launch, uint3 index, unsigned rank) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->rank = rank;
  block->cluster = running.blocks.size() - rank;
  block->dynamic = poisoned(launch.shared);
  block->dynamic_bytes = launch.shared;
  const dim3& size = launch.block;
  const size_t count = size_t(size.x) * size.y * size.z;
  block->threads.resize(count);
  block->collectives.resize((count + kWarp - 1) / kWarp);
  for (size_t i = 0; i < count; ++i) {
    Thread& t = block->threads[i];
    t.index = {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
    t.lane = int(i % kWarp);
    t.warp = i / kWarp;
    t.block = block.get();
  }
  return block;
}

void run_grid(const LaunchRecord& launch, const std::function<void()>& thread, Chain& before) {
  const std::function<void()> guarded = [&] {
    try {
      thread();
      if (!current().copies.empty()) fail(current(), "ends with asynchronous copies that were not waited for");
      if (running.launch->dependent && !current().waited)
        fail(current(), "ends without having waited for the launch before");
    } catch (...) {
      running.failure = std::current_exception();  // the stacks of the other threads are abandoned
    }
  };
  std::mt19937_64 random(settings().seed);
  const size_t clusters_x = launch.grid.x / launch.cluster;
  const size_t count = clusters_x * launch.grid.y * launch.grid.z;
  std::vector<size_t> order;
  reorder(order, count, random);
  struct Finish {
    ~Finish() { running = Running(); }
  } finish;
  running.launch = &launch;
  running.before = &before;
  blockDim = launch.block;
  gridDim = launch.grid;
  for (size_t c : order) {
    if (!launch.cooperative) running.blocks.clear();
    for (unsigned rank = 0; rank < launch.cluster; ++rank) {
      const uint3 index{unsigned(c % clusters_x * launch.cluster + rank), unsigned(c / clusters_x % launch.grid.y),
                        unsigned(c / clusters_x / launch.grid.y)};
      running.blocks.push_back(make_block(launch, index, rank));
    }
    if (!launch.cooperative || running.blocks.size() == count) run_blocks(guarded, random);
  }
}

// The last one first: it starts the others when it waits for them.
void run_chain(Chain& chain) {
  const Submitted last = std::move(chain.back());
  chain.pop_back();
  run_grid(last.launch, last.thread, chain);
}

}  // namespace

Settings& settings() {
  static Settings chosen;
  return chosen;
}

static void run_submitted() {
  Chain chain = std::exchange(submitted, Chain());
  waiting_launches = 0;
  if (!chain.empty()) run_chain(chain);
}

void submit(const LaunchRecord& launch, std::function<void()> thread) {
  if (launch.dependent && submitted.empty()) throw KernelError("kernel " + launch.kernel + " depends on no launch");
  if (!launch.dependent) run_submitted();
  submitted.push_back({launch, std::move(thread)});
}

void finish_launches() {
  const std::lock_guard<std::mutex> lock(launch_mutex());
  run_submitted();
}

void wait_for_launch_before() {
  Thread& t = current();
  t.waited = true;
  if (running.before != nullptr && !running.before->empty()) wait(State::kLaunchBefore);
}

int lane() { return current().lane; }

unsigned char* dynamic_shared() { return current().block->dynamic.get(); }

void* static_shared_bytes(const void* key, size_t bytes) {
  Block& block = *current().block;
  for (Block::Static& s : block.statics)
    if (s.key == key) return s.memory.get();
  size_t all = block.dynamic_bytes + bytes;
  for (const Block::Static& s : block.statics) all += s.bytes;
  constexpr int kUnasked = 48 * 1024;  // every device has that much
  if (all > size_t(std::max(kUnasked, settings().shared_per_block)))
    fail(current(), "more static and dynamic shared memory than a block has");
  block.statics.push_back({key, bytes, poisoned(bytes)});
  return block.statics.back().memory.get();
}

int block_barrier(int contribution) {
  Thread& t = current();
  Block& block = *t.block;
  block.contributions += contribution;
  if (++block.at_barrier < block.threads.size()) {
    wait(State::kBlockBarrier);
    return t.barrier_result;
  }
  for (Thread& other : block.threads) other.barrier_result = block.contributions;
  block.at_barrier = 0;
  block.contributions = 0;
  release(block, State::kBlockBarrier);
  wait(State::kReady);  // the last one to come takes its turn like everyone else
  return t.barrier_result;
}

void warp_collective(const char* name, uint32_t mask, void* request, Complete complete) {
  Thread& t = current();
  if (!(mask >> t.lane & 1)) fail(t, std::string(name) + " with a mask that leaves out its own lane");
  auto& collectives = t.block->collectives[t.warp];
  auto collective =
      std::find_if(collectives.begin(), collectives.end(), [&](const Collective& m) { return m.mask & mask; });
  if (collective == collectives.end()) {
    collectives.push_back({name, mask});
    collective = collectives.end() - 1;
  }
  if (collective->mask != mask) fail(t, std::string(name) + " with another mask than the lanes that wait for it");
  if (std::strcmp(collective->name, name) != 0)
    fail(t, std::string(name) + " while other lanes wait in " + collective->name);
  collective->requests[t.lane] = request;
  collective->arrived |= 1u << t.lane;
  if (collective->arrived != mask) {
    wait(State::kCollective);
    return;
  }
  complete(collective->requests, mask);
  collectives.erase(collective);
  const size_t first = t.warp * kWarp;
  for (int i = 0; i < kWarp; ++i)
    if (mask >> i & 1) t.block->threads[first + i].state = State::kReady;
  wait(State::kReady);
}

void enqueue_copy(void* to, const void* from, size_t bytes, bool valid) {
  Thread& t = current();
  constexpr uintptr_t kLowest = 64 * 1024;  // no memory lies below: a null pointer, or an offset from one
  if (reinterpret_cast<uintptr_t>(from) < kLowest) fail(t, "asynchronous copy from a null pointer");
  const auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (misaligned(to) || misaligned(from)) fail(t, "asynchronous copy at an address that is not 16-byte aligned");
  t.copies.push_back({to, valid ? from : nullptr, bytes, t.copy_group});
}

void commit_copies() { ++current().copy_group; }

void wait_for_copies(int pending_groups) {
  Thread& t = current();
  auto copy = t.copies.begin();
  for (; copy != t.copies.end() && copy->group < t.copy_group - pending_groups; ++copy) {
    if (copy->from == nullptr)
      std::memset(copy->to, 0, copy->bytes);
    else
      std::memcpy(copy->to, copy->from, copy->bytes);
  }
  t.copies.erase(t.copies.begin(), copy);
}

unsigned cluster_rank() { return current().block->rank; }
unsigned cluster_size() { return running.launch->cluster; }

void cluster_barrier() {
  Block& first = *running.blocks[current().block->cluster];
  if (++first.at_cluster_barrier < cluster_size() * first.threads.size()) {
    wait(State::kClusterBarrier);
    return;
  }
  first.at_cluster_barrier = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank)
    release(*running.blocks[first.cluster + rank], State::kClusterBarrier);
  wait(State::kReady);
}

void group_barrier(uint32_t* counter, uint32_t& target, uint32_t blocks) {
  Thread& t = current();
  block_barrier(0);
  if (&t == &t.block->threads.front()) {
    ++*counter;
    t.counter = counter;
    t.target = target += blocks;
    wait(State::kCounter);
  }
  block_barrier(0);
}

void* cluster_address(void* pointer, unsigned rank) {
  Thread& t = current();
  const Block& mine = *t.block;
  if (rank >= cluster_size()) fail(t, "asks for a block that its cluster does not have");
  Block& other = *running.blocks[mine.cluster + rank];
  for (const Thread& theirs : other.threads)
    if (theirs.state != State::kDone) {
      const auto offset_in = [&](const unsigned char* memory, size_t bytes) {
        const ptrdiff_t offset = static_cast<unsigned char*>(pointer) - memory;
        return offset >= 0 && offset < static_cast<ptrdiff_t>(bytes) ? offset : -1;
      };
      const ptrdiff_t dynamic = offset_in(mine.dynamic.get(), mine.dynamic_bytes);
      if (dynamic >= 0) return other.dynamic.get() + dynamic;
      for (const Block::Static& s : mine.statics) {
        const ptrdiff_t offset = offset_in(s.memory.get(), s.bytes);
        if (offset < 0) continue;
        for (Block::Static& twin : other.statics)
          if (twin.key == s.key) return twin.memory.get() + offset;
        fail(t, "asks for a shared variable that the other block has not reached yet");
      }
      fail(t, "maps an address that is not in its shared memory");
    }
  fail(t, "asks for the shared memory of a block that has ended");
}

}  // namespace tokenprune::emulator
