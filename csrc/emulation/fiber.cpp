#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "schedule.h"

#if defined(FACELT_EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes a system call for the signal mask, at each switch; these do not.
#if defined(__linux__) && defined(__x86_64__)
#define FACELT_EMULATION_SWITCH 1
asm(R"(
.text
.globl facelt_emulation_switch
.hidden facelt_emulation_switch
.type facelt_emulation_switch, @function
.p2align 4
facelt_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size facelt_emulation_switch, .-facelt_emulation_switch
)");
#elif defined(__linux__) && defined(__aarch64__)
#define FACELT_EMULATION_SWITCH 1
asm(R"(
.text
.globl facelt_emulation_switch
.hidden facelt_emulation_switch
.type facelt_emulation_switch, %function
.p2align 4
facelt_emulation_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mrs x9, fpcr
  str x9, [sp, #160]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldr x9, [sp, #160]
  msr fpcr, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size facelt_emulation_switch, .-facelt_emulation_switch
)");
#else
#include <ucontext.h>
#endif

#if defined(FACELT_EMULATION_SWITCH)
// Saves the registers that a call must keep on the running stack, stores that stack's pointer, and
// restores them from the other stack.
extern "C" void facelt_emulation_switch(void** save_stack_pointer, void* load_stack_pointer);
#endif

namespace facelt::emulation {

#if defined(FACELT_EMULATION_SWITCH)

struct Fiber::Context {
  void* stack_pointer = nullptr;

  void prepare(void* stack, std::size_t bytes, void (*entry)()) {
    // The frame that facelt_emulation_switch restores. Its zeros end a debugger's backtrace.
#if defined(__x86_64__)
    constexpr std::size_t kEntry = 7;
    std::uint64_t frame[9] = {};  // as pushed above, and the return address of `entry`
    std::uint32_t sse_control;
    std::uint16_t x87_control;
    asm volatile("stmxcsr %0" : "=m"(sse_control));
    asm volatile("fnstcw %0" : "=m"(x87_control));
    frame[0] = std::uint64_t{x87_control} << 32 | sse_control;
#else
    constexpr std::size_t kEntry = 11;
    std::uint64_t frame[22] = {};
    asm volatile("mrs %0, fpcr" : "=r"(frame[20]));
#endif
    frame[kEntry] = reinterpret_cast<std::uintptr_t>(entry);
    stack_pointer = static_cast<char*>(stack) + bytes - sizeof frame;
    std::memcpy(stack_pointer, frame, sizeof frame);
  }
  void jump_to(Context& next) { facelt_emulation_switch(&stack_pointer, next.stack_pointer); }
};

#else

struct Fiber::Context {
  ucontext_t registers;

  void prepare(void* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&registers);
    registers.uc_stack.ss_sp = stack;
    registers.uc_stack.ss_size = bytes;
    registers.uc_link = nullptr;
    makecontext(&registers, entry, 0);
  }
  void jump_to(Context& next) { swapcontext(&registers, &next.registers); }
};

#endif

Fiber::Fiber() : context_(std::make_unique<Context>()) {}

Fiber::Fiber(std::size_t stack_bytes)
    : context_(std::make_unique<Context>()), stack_bytes_(stack_bytes) {
  const std::size_t guard_bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  mapping_bytes_ = stack_bytes + guard_bytes;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapping_ == MAP_FAILED) throw Error("no memory for the stack of an emulated thread");
  mprotect(mapping_, guard_bytes, PROT_NONE);
  stack_ = static_cast<char*>(mapping_) + guard_bytes;
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
  unpoison(stack_, stack_bytes_);
  munmap(mapping_, mapping_bytes_);
}

void Fiber::restart(void (*entry)()) {
  if (has_frames_) unpoison(stack_, stack_bytes_);
  has_frames_ = false;
  context_->prepare(const_cast<void*>(stack_), stack_bytes_, entry);
}

void Fiber::jump_to(Fiber& next) { context_->jump_to(*next.context_); }

#if defined(FACELT_EMULATION_ASAN)

void Fiber::switch_to(Fiber& next) {
  has_frames_ = true;
  __sanitizer_start_switch_fiber(&fake_stack_, next.stack_, next.stack_bytes_);
  jump_to(next);
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
  has_frames_ = false;
}

void Fiber::leave_to(Fiber& next) {
  fake_stack_ = nullptr;  // freed by the switch
  __sanitizer_start_switch_fiber(nullptr, next.stack_, next.stack_bytes_);
  jump_to(next);
  std::abort();  // unreachable: nobody switches back to a fiber that left
}

void Fiber::entered_from(Fiber& previous) {
  // The only way to learn the bounds of a stack that is not ours, the host's.
  __sanitizer_finish_switch_fiber(fake_stack_, &previous.stack_, &previous.stack_bytes_);
}

#else

void Fiber::switch_to(Fiber& next) { jump_to(next); }

void Fiber::leave_to(Fiber& next) {
  jump_to(next);
  std::abort();  // unreachable: nobody switches back to a fiber that left
}

void Fiber::entered_from(Fiber&) {}

#endif

}  // namespace facelt::emulation
