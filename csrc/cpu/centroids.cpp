#include "centroids.h"

namespace facelt::cpu {

void class_centroids_forward(const TensorView& features, const TensorView& order,
                             const TensorView& offsets, const TensorView& num_classes,
                             const TensorView& centroids, const TensorView& counts,
                             Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = centroids.size(0);
  const std::int64_t* starts = index_pointer(offsets, "offsets", batch + 1);
  require_rows(rows, *index_pointer(num_classes, "num_classes", 1));
  std::int64_t* sizes = index_output(counts, "counts", rows);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    const T* x = input<T>(features, "features", batch * dimensions);
    const std::int64_t* position = index_pointer(order, "order", batch);
    Compute<T>* out = output<Compute<T>>(centroids, "centroids", rows * dimensions);
    advise_huge_pages(centroids);
    FirstException failure;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads(execution))
    for (std::int64_t s = 0; s < rows; ++s) {
      const std::int64_t begin = starts[std::min(s, batch)], end = starts[std::min(s + 1, batch)];
      sizes[s] = end - begin;
      failure.run(
          [&] { write_centroid(x, dimensions, position, begin, end, out + s * dimensions); });
    }
    failure.rethrow();
  });
}

void class_centroids_backward(const TensorView& grad_centroids, const TensorView& segment,
                              const TensorView& counts, const TensorView& grad_features,
                              Execution execution) {
  const std::int64_t rows = grad_centroids.size(0), dimensions = grad_centroids.size(1);
  const std::int64_t batch = grad_features.size(0);
  const std::int64_t* classes = index_pointer(segment, "segment", batch);
  const std::int64_t* sizes = index_pointer(counts, "counts", rows);
  dispatch_floating(grad_features.dtype, "grad_features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const A* grad = input<A>(grad_centroids, "grad_centroids", rows * dimensions);
    T* out = output<T>(grad_features, "grad_features", batch * dimensions);
    advise_huge_pages(grad_features);
#pragma omp parallel for schedule(static) num_threads(threads(execution))
    for (std::int64_t i = 0; i < batch; ++i) {
      if (classes[i] < 0 || classes[i] >= rows) {
        const A nothing = classes[i] < 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
        std::fill_n(out + i * dimensions, dimensions, narrow<T>(nothing));
        continue;
      }
      const A* row = grad + classes[i] * dimensions;
      const A share = A(1) / static_cast<A>(sizes[classes[i]]);
      for (std::int64_t d = 0; d < dimensions; ++d) {
        out[i * dimensions + d] = narrow<T>(share * row[d]);
      }
    }
  });
}

void min_centroid_distance_forward(const TensorView& centroids, const TensorView& counts,
                                   bool squared, const TensorView& distance, const TensorView& pair,
                                   const TensorView&, Execution execution) {
  const std::int64_t rows = centroids.size(0), dimensions = centroids.size(1);
  const std::int64_t* sizes = index_pointer(counts, "counts", rows);
  std::int64_t* chosen = index_output(pair, "pair", 2);
  std::vector<std::int64_t> live;
  for (std::int64_t s = 0; s < rows; ++s) {
    if (sizes[s] > 0) live.push_back(s);
  }
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    MinDistance<A> search(input<A>(centroids, "centroids", rows * dimensions), dimensions, live);
    FirstException failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads(execution))
    for (std::int64_t block = 0; block < search.size(); ++block) {
      failure.run([&] { search.run(block); });
    }
    failure.rethrow();
    const auto result = search.result();
    *output<A>(distance, "distance", 1) =
        squared ? result.squared_distance : square_root(result.squared_distance);
    chosen[0] = result.q;
    chosen[1] = result.r;
  });
}

std::int64_t min_centroid_distance_workspace(std::int64_t) { return 0; }

void min_centroid_distance_backward(const TensorView& grad_distance, const TensorView& centroids,
                                    const TensorView& distance, const TensorView& pair,
                                    bool squared, const TensorView& grad_centroids, Execution) {
  const std::int64_t rows = centroids.size(0), dimensions = centroids.size(1);
  const std::int64_t* chosen = index_pointer(pair, "pair", 2);
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* x = input<A>(centroids, "centroids", rows * dimensions);
    A* out = output<A>(grad_centroids, "grad_centroids", rows * dimensions);
    const A grad = *input<A>(grad_distance, "grad_distance", 1);
    const A value = *input<A>(distance, "distance", 1);
    std::fill(out, out + rows * dimensions, value == value ? A(0) : value);
    if (chosen[0] == kNoPair) return;
    const A scale = squared ? 2 * grad : value > 0 ? grad / value : A(0);
    const A* q = x + chosen[0] * dimensions;
    const A* r = x + chosen[1] * dimensions;
    row_kernels<A>().add_scaled_difference(q, r, scale, out + chosen[0] * dimensions, dimensions);
    row_kernels<A>().add_scaled_difference(r, q, scale, out + chosen[1] * dimensions, dimensions);
  });
}

}  // namespace facelt::cpu
