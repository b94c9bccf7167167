#include "../compactness.h"

#include <algorithm>

#include "norms.h"

namespace facelt::cpu {

namespace {

constexpr std::int64_t kSelectionStep = 512;

// Larger first, NaN before all.
template <class A>
bool comes_first(A x, A y) {
  return x != x ? y == y : x > y;
}

// Brings the k largest to the front; returns how many are left.
template <class A>
std::int64_t keep_largest(A* kept, std::int64_t count, std::int64_t k) {
  if (count <= k) return count;
  std::nth_element(kept, kept + k - 1, kept + count, comes_first<A>);
  return k;
}

// A row's kept products.
template <class A>
struct Selection {
  std::int64_t k, capacity;
  A* kept;
  std::int64_t* count;
  A* threshold;

  void take(const A* products, std::int64_t columns) {
    for (std::int64_t j = 0; j < columns; j += kSelectionStep) {
      if (*count + kSelectionStep > capacity) {
        *count = keep_largest(kept, *count, k);
        *threshold = kept[k - 1];
      }
      *count += softmax_kernels<A>().keep_above(products + j, *threshold, kept + *count,
                                                std::min(kSelectionStep, columns - j));
    }
  }
};

template <class A>
A log_sum_exp(const A* x, std::int64_t n, A scale) {
  const SoftmaxKernels<A>& kernels = softmax_kernels<A>();
  std::vector<A> logits(n);
  kernels.logits(x, nullptr, scale, logits.data(), n);
  const A largest = kernels.maximum(logits.data(), n);
  if (n == 0) return largest;
  return largest + std::log(kernels.sum_exp(logits.data(), largest, n));
}

}  // namespace

void compactness_select(const TensorView& products, const TensorView& column_scales,
                        const TensorView& classes, std::int64_t first_class, std::int64_t k,
                        bool start, const TensorView& kept, const TensorView& counts,
                        const TensorView& thresholds, Execution execution) {
  require_ranges(k);
  const std::int64_t rows = products.size(0), columns = products.size(1);
  const std::int64_t capacity = compactness_capacity(k);
  const std::int64_t* own = index_pointer(classes, "classes", rows);
  std::int64_t* count = index_output(counts, "counts", rows);
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    constexpr A kNothing = -std::numeric_limits<A>::infinity();
    const P* in = input<P>(products, "products", rows * columns);
    const A* scales =
        column_scales.numel() > 0 ? input<A>(column_scales, "column_scales", columns) : nullptr;
    A* values = output<A>(kept, "kept", rows * capacity);
    A* lowest = output<A>(thresholds, "thresholds", rows);
    parallel(threads(execution), [&] {
      RowReader<P> reader(columns);
      std::vector<A> scaled(columns);
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < rows; ++i) {
        if (start) {
          count[i] = 0;
          lowest[i] = kNothing;
        }
        softmax_kernels<A>().logits(reader.read(in + i * columns), scales, A(1), scaled.data(),
                                    columns);
        const std::int64_t self = own[i] - first_class;
        if (self >= 0 && self < columns) scaled[self] = kNothing;
        Selection<A>{k, capacity, values + i * capacity, count + i, lowest + i}.take(scaled.data(),
                                                                                     columns);
      }
    });
  });
}

std::int64_t compactness_capacity(std::int64_t k) { return selection_capacity(k, kSelectionStep); }

void compactness_reduce(const TensorView& kept, const TensorView& counts, std::int64_t k,
                        double scale, const TensorView& compactness, Execution execution) {
  require_ranges(k);
  const std::int64_t rows = counts.numel(), capacity = compactness_capacity(k);
  const std::int64_t* count = index_pointer(counts, "counts", rows);
  dispatch_floating(kept.dtype, "kept", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    A* values = output<A>(kept, "kept", rows * capacity);
    A* out = output<A>(compactness, "compactness", rows);
    const auto reduce = [=](std::int64_t i) {
      const std::int64_t largest = keep_largest(values + i * capacity, count[i], k);
      out[i] = log_sum_exp(values + i * capacity, largest, static_cast<A>(scale));
    };
    FirstException failure;
#pragma omp parallel for schedule(static) num_threads(threads(execution))
    for (std::int64_t i = 0; i < rows; ++i) failure.run([&] { reduce(i); });
    failure.rethrow();
  });
}

}  // namespace facelt::cpu
