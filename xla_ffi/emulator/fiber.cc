#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace jax_gptq::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

}  // namespace

Fiber::Fiber() {
  stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack_, sysconf(_SC_PAGESIZE), PROT_NONE);
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

#if defined(__x86_64__)

// Saves what the System V ABI lets a callee keep, swaps stacks, and returns on the other one.
// swapcontext() does the same with a system call for the signal mask.
extern "C" void jax_gptq_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.type jax_gptq_switch_stack, @function
.hidden jax_gptq_switch_stack
.globl jax_gptq_switch_stack
jax_gptq_switch_stack:
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
.size jax_gptq_switch_stack, . - jax_gptq_switch_stack
)");

void Fiber::start(void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_) + kStackBytes);
  *--top = 0;  // keeps the stack aligned as after a call, and is entry's return address
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  own_ = top;
}

void Fiber::resume() { jax_gptq_switch_stack(&scheduler_, own_); }

void Fiber::suspend() { jax_gptq_switch_stack(&own_, scheduler_); }

#else

void Fiber::start(void (*entry)()) {
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_;
  own_.uc_stack.ss_size = kStackBytes;
  own_.uc_link = nullptr;
  makecontext(&own_, entry, 0);
}

void Fiber::resume() { swapcontext(&scheduler_, &own_); }

void Fiber::suspend() { swapcontext(&own_, &scheduler_); }

#endif

}  // namespace jax_gptq::emulator
