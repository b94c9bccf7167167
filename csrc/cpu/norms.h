// A row of any floating type as the row kernels take it, and its norm.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "common.h"
#include "rows.h"

namespace facelt::cpu {

// Where the rows of T are read: at their place, or widened into a buffer.
template <class T>
class RowReader {
 public:
  using A = Compute<T>;
  explicit RowReader(std::int64_t n) : n_(n) {
    if constexpr (!std::is_same_v<T, A>) buffer_.resize(n);
  }

  const A* read(const T* row) {
    if constexpr (std::is_same_v<T, A>) {
      return row;
    } else {
      conversion_kernels<T>().widen(row, buffer_.data(), n_);
      return buffer_.data();
    }
  }

 private:
  std::int64_t n_;
  std::vector<A> buffer_;
};

// Where rows are reckoned before they are stored as T.
template <class T>
class RowWriter {
 public:
  using A = Compute<T>;
  explicit RowWriter(std::int64_t n) : n_(n) {
    if constexpr (!std::is_same_v<T, A>) buffer_.resize(n);
  }

  A* place(T* row) {
    if constexpr (std::is_same_v<T, A>) {
      return row;
    } else {
      return buffer_.data();
    }
  }

  void store(T* row) {
    if constexpr (!std::is_same_v<T, A>) conversion_kernels<T>().narrow(buffer_.data(), row, n_);
  }

 private:
  std::int64_t n_;
  std::vector<A> buffer_;
};

template <class T>
void narrow_row(const Compute<T>* x, T* out, std::int64_t n) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    std::copy_n(x, n, out);
  } else {
    conversion_kernels<T>().narrow(x, out, n);
  }
}

// 1 / |x|; 0 for zeros, NaN for what is not finite. The squares of very large and very small
// numbers leave the range of A: those rows are divided by their largest number first.
template <class A>
A inverse_norm(const A* x, std::int64_t n) {
  constexpr A kLow = std::is_same_v<A, float> ? A(1e-30) : A(1e-290);
  const A squares = row_kernels<A>().dot(x, x, n);
  if (squares >= kLow && squares <= 1 / kLow) return 1 / std::sqrt(squares);
  A largest = 0;
  for (std::int64_t d = 0; d < n; ++d) largest = std::max(largest, std::abs(x[d]));
  if (!row_kernels<A>().all_finite(x, n)) return std::numeric_limits<A>::quiet_NaN();
  if (largest < std::numeric_limits<A>::min()) return 0;
  A sum = 0;
  for (std::int64_t d = 0; d < n; ++d) sum += (x[d] / largest) * (x[d] / largest);
  return 1 / std::sqrt(sum) / largest;
}

}  // namespace facelt::cpu
