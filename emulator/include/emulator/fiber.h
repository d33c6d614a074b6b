// A fiber: a stack of its own that a thread can switch to and back from.
#pragma once

#include <cstddef>
#include <functional>

namespace tokenprune::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() starts `body` on this fiber's stack. What an unfinished body had there is forgotten.
  void start(const std::function<void()>* body);
  // Runs the body until it calls suspend() or returns. True once it has returned.
  bool resume();
  // Back to whoever resumed; called on the fiber's own stack.
  void suspend();

 private:
  static void enter();
  void switch_stacks(bool into, bool finished);

  void *memory_, *inside_ = nullptr, *outside_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  bool done_ = true;
  // What AddressSanitizer has to know of the two stacks.
  void* sanitizer_state_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace tokenprune::emulator
