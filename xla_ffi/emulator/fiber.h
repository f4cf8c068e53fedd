// Threads of a block as fibers: each has a stack, and control passes only where one asks for it.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace jax_gptq::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls `entry`, which must never return: it ends in a last suspend().
  void start(void (*entry)());

  // Called by the scheduler: runs the fiber until it suspends.
  void resume();

  // Called by the fiber: back to the scheduler, which continues after its resume().
  void suspend();

 private:
  void* stack_;  // lowest address; its first page is a guard
#if defined(__x86_64__)
  void* own_ = nullptr;        // stack pointer while suspended
  void* scheduler_ = nullptr;  // stack pointer of the scheduler while running
#else
  ucontext_t own_, scheduler_;
#endif
};

}  // namespace jax_gptq::emulator
