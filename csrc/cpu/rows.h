// Vectorised loops over rows of D numbers, compiled for several instruction sets; the best one the
// processor has is chosen once.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace facelt::cpu {

constexpr int kTile = 4;

template <class A>
struct RowKernels {
  // out[4 * i + j] = |a[i] - b[j]|^2 for four rows against four
  void (*squared_distances)(const A* const* a, const A* const* b, std::int64_t n, A* out);
  void (*add)(const A* x, A* sum, std::int64_t n);
  void (*scale)(const A* x, A factor, A* out, std::int64_t n);
  void (*divide)(A* x, A divisor, std::int64_t n);
  // out += factor * (x - y)
  void (*add_scaled_difference)(const A* x, const A* y, A factor, A* out, std::int64_t n);
  bool (*all_finite)(const A* x, std::int64_t n);
};

template <class T>
struct ConversionKernels {
  void (*widen)(const T* x, Compute<T>* out, std::int64_t n);
  void (*narrow)(const Compute<T>* x, T* out, std::int64_t n);
};

template <class A>
const RowKernels<A>& row_kernels();

template <class T>
const ConversionKernels<T>& conversion_kernels();

}  // namespace facelt::cpu
