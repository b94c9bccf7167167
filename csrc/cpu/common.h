#pragma once

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <exception>

#include "../launchers.h"
#include "../scalar.h"

namespace facelt::cpu {

inline int threads(Execution execution) { return static_cast<int>(execution.stream_or_threads); }

inline const std::int64_t* index_pointer(const TensorView& view, const char* name,
                                         std::int64_t numel) {
  return pointer<const std::int64_t>(view, name, ScalarType::kInt64, numel, kCpuDevice);
}

inline std::int64_t* index_output(const TensorView& view, const char* name, std::int64_t numel) {
  return pointer<std::int64_t>(view, name, ScalarType::kInt64, numel, kCpuDevice);
}

template <class T>
const T* input(const TensorView& view, const char* name, std::int64_t numel) {
  return pointer<const T>(view, name, Scalar<T>::kType, numel, kCpuDevice);
}

template <class T>
T* output(const TensorView& view, const char* name, std::int64_t numel) {
  return pointer<T>(view, name, Scalar<T>::kType, numel, kCpuDevice);
}

inline void require_rows(std::int64_t rows, std::int64_t classes) {
  if (classes > rows) {
    throw std::invalid_argument("max_classes: " + std::to_string(rows) + " is too small for " +
                                std::to_string(classes) + " classes");
  }
}

// Page faults dominate the writing of a large fresh output; huge pages make them 512 times fewer.
inline void advise_huge_pages(const TensorView& view) {
#if defined(MADV_HUGEPAGE)
  constexpr std::int64_t kWorthwhile = 4 << 20;
  const std::int64_t bytes = view.numel() * size_of(view.dtype);
  if (bytes < kWorthwhile) return;
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin =
      (reinterpret_cast<std::uintptr_t>(view.data) + page - 1) & ~(page - 1);
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(view.data) + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)view;
#endif
}

// An exception (memory running out) may not leave an OpenMP region; it is carried out by hand.
class FirstException {
 public:
  template <class Function>
  void run(Function&& function) noexcept {
    try {
      function();
    } catch (...) {
#pragma omp critical(facelt_first_exception)
      if (!first_) first_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// Runs `body` on each of `threads` threads; loops in it are shared by `omp for`. Compilers disagree
// on what a lambda inside a lexical OpenMP region may capture; here no lambda is inside one.
template <class Body>
void parallel(int threads, const Body& body) {
  FirstException failure;
#pragma omp parallel num_threads(threads)
  failure.run(body);
  failure.rethrow();
}

}  // namespace facelt::cpu
