// Vectorised loops over rows of D numbers, compiled for several instruction sets; the best one the
// processor has is chosen once.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace facelt::cpu {

constexpr int kTile = 4;

// out[i][d] = bases[i][d] + the sum over r of factors[i, r] * rows[r][d], for matrices of few rows
// on one side, where a library's product takes longer to begin than to end.
template <class A>
struct Product {
  const A* factors;
  std::int64_t output_stride, term_stride;  // of factors, along i and along r
  const A* rows;
  std::int64_t row_stride;
  const A* const* bases;  // null for zeros
  A* out;
  std::int64_t out_stride;
  std::int64_t outputs, count, width;  // numbers of i, r and d
};

template <class A>
struct RowKernels {
  // out[4 * i + j] = |a[i] - b[j]|^2 for four rows against four
  void (*squared_distances)(const A* const* a, const A* const* b, std::int64_t n, A* out);
  // The same of a[i] . b[j]
  void (*inner_products)(const A* const* a, const A* const* b, std::int64_t n, A* out);
  void (*add)(const A* x, A* sum, std::int64_t n);
  // sum = that of the `count` rows [n] of x that `rows` lists, in its order
  void (*sum_rows)(const A* x, std::int64_t n, const std::int64_t* rows, std::int64_t count,
                   A* sum);
  void (*scale)(const A* x, A factor, A* out, std::int64_t n);
  void (*add_scaled)(const A* x, A factor, A* out, std::int64_t n);  // out += factor * x
  void (*divide)(A* x, A divisor, std::int64_t n);
  // out += factor * (x - y)
  void (*add_scaled_difference)(const A* x, const A* y, A factor, A* out, std::int64_t n);
  bool (*all_finite)(const A* x, std::int64_t n);
  A (*dot)(const A* x, const A* y, std::int64_t n);
  A (*squared_distance)(const A* x, const A* y, std::int64_t n);
  void (*product)(const Product<A>& product);
  // out = factor * (raw - c * v), where v = inverse_norm * x and c = v . raw: the gradient through
  // x / |x|. out may be raw.
  void (*project)(const A* raw, const A* x, A inverse_norm, A factor, A* out, std::int64_t n);
};

// kHingeSamples samples of the cluster margin loss, side by side. Classes and clusters are numbers
// that A holds exactly.
constexpr int kHingeSamples = 16;

template <class A>
struct HingeBlock {
  const A* classes;  // of each cluster; -1 where it has no samples
  std::int64_t clusters;
  A between_margin, within_margin;
  const A *own_cluster, *own_class, *factors;  // of each sample
  A* terms;   // [clusters, samples]: similarities, which become factor * the loss's gradient
  A* losses;  // of each sample
};

// Logits are scale * products, times a scale of their column where there are any.
template <class A>
struct SoftmaxKernels {
  void (*logits)(const A* products, const A* column_scales, A scale, A* out, std::int64_t n);
  A (*maximum)(const A* x, std::int64_t n);           // knows nothing of NaN
  A (*sum_exp)(const A* x, A shift, std::int64_t n);  // of exp(x - shift)
  // out = factor * column scale * exp(logit - shift); out may be products
  void (*exponentials)(const A* products, const A* column_scales, A scale, A shift, A factor,
                       A* out, std::int64_t n);
  // Appends to `kept` what is not <= threshold, in order; returns how many that were.
  std::int64_t (*keep_above)(const A* x, A threshold, A* kept, std::int64_t n);
  void (*hinges)(const HingeBlock<A>& block);
};

template <class T>
struct ConversionKernels {
  void (*widen)(const T* x, Compute<T>* out, std::int64_t n);
  void (*narrow)(const Compute<T>* x, T* out, std::int64_t n);
};

template <class A>
const RowKernels<A>& row_kernels();

template <class A>
const SoftmaxKernels<A>& softmax_kernels();

template <class T>
const ConversionKernels<T>& conversion_kernels();

}  // namespace facelt::cpu
