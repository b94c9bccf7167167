// Stacks that one host thread runs in turn.
#pragma once

#include <cstddef>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#define FACELT_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FACELT_EMULATION_ASAN 1
#endif
#endif

#if defined(FACELT_EMULATION_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace facelt::emulation {

#if defined(FACELT_EMULATION_ASAN)
constexpr bool kAddressSanitizer = true;
inline void poison(const void* memory, std::size_t bytes) {
  __asan_poison_memory_region(memory, bytes);
}
inline void unpoison(const void* memory, std::size_t bytes) {
  __asan_unpoison_memory_region(memory, bytes);
}
#else
constexpr bool kAddressSanitizer = false;
inline void poison(const void*, std::size_t) {}
inline void unpoison(const void*, std::size_t) {}
#endif

class Fiber {
 public:
  /// The stack on which the host thread already runs.
  Fiber();
  /// A stack of its own, with a guard page below it.
  explicit Fiber(std::size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Forgets all that lies on the stack; the next switch to this fiber calls `entry`, which must
  /// not return.
  void restart(void (*entry)());
  /// Returns when another fiber switches back to this one, which must be the running one.
  void switch_to(Fiber& next);
  /// Switches for good: nothing on this fiber's stack is needed again.
  [[noreturn]] void leave_to(Fiber& next);
  /// To be called first by an entry, on its fiber. `previous` is the one that switched to it.
  void entered_from(Fiber& previous);

 private:
  struct Context;

  void jump_to(Fiber& next);

  std::unique_ptr<Context> context_;
  void* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  const void* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  bool has_frames_ = false;
#if defined(FACELT_EMULATION_ASAN)
  void* fake_stack_ = nullptr;  // where AddressSanitizer may keep this fiber's locals
#endif
};

}  // namespace facelt::emulation
