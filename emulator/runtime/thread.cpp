// What a thread of a kernel asks for: its place, shared memory, barriers, warp collectives, copies and its cluster.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "running.h"

namespace tokenprune::emulator {

Running running;

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

void release(Block& block, State from) {
  for (Thread& t : block.threads)
    if (t.state == from) t.state = State::kReady;
}

// Exactly as many bytes as asked for, so that AddressSanitizer sees the first byte past the end.
std::unique_ptr<unsigned char[]> poisoned(size_t bytes) {
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::memset(memory.get(), kPoison, bytes);
  return memory;
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
  std::memset(to, kPoison, bytes);  // the hardware may write from now on: what was there is gone
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
  ++first.cluster_barriers;
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
  // Blocks of a cluster need not start together: before their first barrier, an address may be nobody's yet.
  const size_t behind = running.blocks[mine.cluster]->cluster_barriers;
  if (&other != &mine && behind == 0) fail(t, "asks for the shared memory of a block that may not have started");
  for (const Thread& theirs : other.threads)
    if (theirs.state != State::kDone) {
      if (&other != &mine) other.mapped_after = behind;
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
