// Stack switching: a few instructions on x86-64 (a switch takes nanoseconds, and a block of 256 threads makes one for
// every thread at every barrier), ucontext elsewhere.
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace tokenprune::emulator {

namespace {

constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif

thread_local Fiber* entering = nullptr;

}  // namespace

#if defined(__x86_64__)

// Saves the callee-saved registers and the stack pointer of the caller, and continues where `to` was saved.
extern "C" void tokenprune_switch_stack(void** from, void* to);
asm(R"(
.text
.local tokenprune_switch_stack
.type tokenprune_switch_stack, @function
tokenprune_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tokenprune_switch_stack, . - tokenprune_switch_stack
)");

#endif

// A page below the stack faults when a kernel's locals overflow it.
Fiber::Fiber() {
  memory_ = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory_ == MAP_FAILED) throw std::runtime_error("the process may not map one more stack (vm.max_map_count)");
  mprotect(memory_, kPage, PROT_NONE);
#if !defined(__x86_64__)
  inside_ = new ucontext_t;
  outside_ = new ucontext_t;
#endif
}

Fiber::~Fiber() {
  munmap(memory_, kStack + kPage);
#if !defined(__x86_64__)
  delete static_cast<ucontext_t*>(inside_);
  delete static_cast<ucontext_t*>(outside_);
#endif
}

void Fiber::start(const std::function<void()>* body) {
  body_ = body;
  done_ = false;
  sanitizer_state_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(static_cast<char*>(memory_) + kPage, kStack);  // the frames of an unfinished body
#endif
#if defined(__x86_64__)
  // As if `enter` had been called at the top of the stack: six saved registers, and after the return to `enter` a stack
  // pointer 8 bytes off a multiple of 16, where a call leaves it.
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(memory_) + kPage + kStack);
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  inside_ = top;
#else
  auto* context = static_cast<ucontext_t*>(inside_);
  getcontext(context);
  context->uc_stack.ss_sp = static_cast<char*>(memory_) + kPage;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::enter, 0);
#endif
}

void Fiber::switch_stacks(bool into, bool finished) {
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  if (into)
    __sanitizer_start_switch_fiber(&mine, static_cast<char*>(memory_) + kPage, kStack);
  else
    __sanitizer_start_switch_fiber(finished ? nullptr : &sanitizer_state_, outside_bottom_, outside_size_);
#else
  (void)finished;
#endif
#if defined(__x86_64__)
  if (into)
    tokenprune_switch_stack(&outside_, inside_);
  else
    tokenprune_switch_stack(&inside_, outside_);
#else
  auto *inside = static_cast<ucontext_t*>(inside_), *outside = static_cast<ucontext_t*>(outside_);
  if (into)
    swapcontext(outside, inside);
  else
    swapcontext(inside, outside);
#endif
#if defined(__SANITIZE_ADDRESS__)
  if (into)
    __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
  else
    __sanitizer_finish_switch_fiber(sanitizer_state_, &outside_bottom_, &outside_size_);
#endif
}

void Fiber::enter() {
  Fiber* self = entering;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self->outside_bottom_, &self->outside_size_);
#endif
  (*self->body_)();
  self->done_ = true;
  self->switch_stacks(false, true);
  std::abort();  // a finished fiber is never resumed
}

bool Fiber::resume() {
  entering = this;
  switch_stacks(true, false);
  return done_;
}

void Fiber::suspend() { switch_stacks(false, false); }

}  // namespace tokenprune::emulator
