#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

#include "../launchers.h"
#include "../scalar.h"
#include "huge_pages.h"

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

}  // namespace facelt::cpu
