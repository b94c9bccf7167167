#include "ranges.h"

namespace facelt::cpu {

void class_ranges_forward(const TensorView& features, const TensorView& labels,
                          const TensorView& order, const TensorView& offsets,
                          const TensorView& num_classes, bool squared, const TensorView& ranges,
                          const TensorView& pairs, const TensorView&, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = ranges.size(0), k = ranges.size(1);
  const std::int64_t* position = index_pointer(order, "order", batch);
  const std::int64_t* starts = index_pointer(offsets, "offsets", batch + 1);
  const std::int64_t classes = *index_pointer(num_classes, "num_classes", 1);
  require_ranges(k);
  require_rows(rows, classes);
  index_pointer(labels, "labels", batch);
  std::int64_t* chosen = index_output(pairs, "pairs", rows * k * 2);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    RangeTasks<T> tasks(input<T>(features, "features", batch * dimensions), dimensions, position,
                        starts, batch, classes, k);
    A* values = output<A>(ranges, "ranges", rows * k);
    FirstException failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads(execution))
    for (std::int64_t t = 0; t < tasks.size(); ++t) failure.run([&] { tasks.run(t); });
    failure.rethrow();
    for (std::int64_t s = 0; s < rows; ++s) {
      const auto largest = s < classes ? tasks.largest(s) : std::vector<Candidate<A>>{};
      write_ranges(largest, position, batch, k, squared, values + s * k, chosen + s * k * 2);
    }
  });
}

std::int64_t class_ranges_workspace(std::int64_t, std::int64_t) { return 0; }

void class_ranges_backward(const TensorView& features, const TensorView& segment,
                           const TensorView& pairs, const TensorView& pair_scale,
                           const TensorView& grad_features, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = pair_scale.size(0), k = pair_scale.size(1);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    advise_huge_pages(grad_features);
    write_pair_gradients(
        input<T>(features, "features", batch * dimensions), batch, dimensions,
        index_pointer(segment, "segment", batch), index_pointer(pairs, "pairs", rows * k * 2),
        input<A>(pair_scale, "pair_scale", rows * k), rows, k, A(1),
        output<T>(grad_features, "grad_features", batch * dimensions), threads(execution),
        [&](std::int64_t, A* row) { std::fill(row, row + dimensions, A(0)); });
  });
}

}  // namespace facelt::cpu
