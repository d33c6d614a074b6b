#include "emulator/grid.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "running.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace tokenprune::emulator {

namespace {

// So many launches overlap at most: each has stacks of its own, and the kernel bounds how many a process may map.
constexpr size_t kMostOverlapping = 8;
// So many stacks wait for the next launch: making one is slow, but whatever else the process does maps memory too.
constexpr size_t kMostIdle = 4096;

using Fibers = std::vector<std::unique_ptr<Fiber>>;
Fibers idle_fibers;
thread_local Chain submitted;

void run_chain(Chain& chain);

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
  if (block.mapped_after > 0 && block.mapped_after == running.blocks[block.cluster]->cluster_barriers)
    throw KernelError("kernel " + running.launch->kernel + ", block " + describe(block.index) +
                      ": ends while another block may still use its shared memory");
  std::memset(block.dynamic.get(), kPoison, block.dynamic_bytes);
  for (Block::Static& s : block.statics) std::memset(s.memory.get(), kPoison, s.bytes);
}

// Did a block write to this one's shared memory after that one had ended?
bool was_disturbed(const Block& block) {
  const auto other_than_poison = [](const unsigned char* memory, size_t bytes) {
    return bytes > 0 && (memory[0] != kPoison || std::memcmp(memory, memory + 1, bytes - 1) != 0);
  };
  for (const Block::Static& s : block.statics)
    if (other_than_poison(s.memory.get(), s.bytes)) return true;
  return other_than_poison(block.dynamic.get(), block.dynamic_bytes);
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

// Runs the launches in front, for which all threads wait that are left. False if there are none.
bool run_launches_before() {
  if (running.before == nullptr || running.before->empty()) return false;
  Running mine = std::exchange(running, Running());
  run_chain(*mine.before);
  running = std::move(mine);
  running.before = nullptr;
  blockDim = running.launch->block;
  gridDim = running.launch->grid;
  for (const auto& block : running.blocks) release(*block, State::kLaunchBefore);
  return true;
}

// The stacks of running threads, lent from the idle ones.
struct Lent {
  Fibers fibers;
  ~Lent() {
    for (auto& fiber : fibers)
      if (idle_fibers.size() < kMostIdle) idle_fibers.push_back(std::move(fiber));
  }
  Fiber* one_more() {
    if (idle_fibers.empty()) return fibers.emplace_back(std::make_unique<Fiber>()).get();
    fibers.push_back(std::move(idle_fibers.back()));
    idle_fibers.pop_back();
    return fibers.back().get();
  }
};

// Warps run ahead of each other as far as barriers let them, so that a barrier too few shows: the first warp writes
// what the last one has not read yet, or reads what it has not written.
void run_blocks(const std::function<void()>& guarded, std::mt19937_64& random) {
  std::vector<std::vector<Thread*>> warps;
  Lent lent;
  for (const auto& block : running.blocks)
    for (Thread& t : block->threads) {
      if (t.lane == 0) warps.emplace_back();
      warps.back().push_back(&t);
      t.fiber = lent.one_more();
      t.fiber->start(&guarded);
    }
  std::vector<size_t> order, lanes;
  for (size_t done = 0; done < lent.fibers.size();) {
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
  if (running.launch->cluster == 1) return;
  for (const auto& block : running.blocks)
    if (was_disturbed(*block))
      throw KernelError("kernel " + running.launch->kernel + ", block " + describe(block->index) +
                        ": its shared memory was written to after it had ended");
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
  if (!chain.empty()) run_chain(chain);
}

void submit(const LaunchRecord& launch, std::function<void()> thread) {
  if (launch.dependent && submitted.empty()) throw KernelError("kernel " + launch.kernel + " depends on no launch");
  if (!launch.dependent || submitted.size() == kMostOverlapping) run_submitted();
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

}  // namespace tokenprune::emulator
