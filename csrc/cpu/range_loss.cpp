#include "../range_loss_state.h"
#include "centroids.h"
#include "groups.h"
#include "ranges.h"

namespace facelt::cpu {

namespace {

// The intra term's sum of harmonic means; what each selected pair passes back goes into pair_scale.
template <class T>
Compute<T> reduce_ranges(const RangeTasks<T>& tasks, const std::vector<std::int64_t>& order,
                         std::int64_t classes, const RangeLossOptions& options,
                         const RangeLossState<Compute<T>>& out) {
  using A = Compute<T>;
  const std::int64_t k = options.k;
  const std::int64_t batch = static_cast<std::int64_t>(order.size());
  std::vector<A> ranges(k);
  A sum = 0;
  std::fill(out.pairs, out.pairs + batch * k * 2, kNoPair);
  std::fill(out.pair_scale, out.pair_scale + batch * k, A(0));
  for (std::int64_t s = 0; s < classes; ++s) {
    const auto largest = tasks.largest(s);
    write_ranges(largest, order.data(), batch, k, options.squared, ranges.data(),
                 out.pairs + s * k * 2);
    sum += harmonic_mean(ranges.data(), static_cast<std::int64_t>(largest.size()), options.squared,
                         static_cast<A>(options.alpha), out.pair_scale + s * k);
  }
  return sum;
}

template <class T>
Compute<T> forward(const T* features, const std::int64_t* labels, std::int64_t batch,
                   std::int64_t dimensions, const RangeLossOptions& options,
                   const RangeLossState<Compute<T>>& out, int num_threads) {
  using A = Compute<T>;
  std::vector<std::int64_t> order(batch);
  const std::int64_t classes =
      group_labels(labels, batch, options.ignored, order.data(), out.segment, out.offsets);
  RangeTasks<T> tasks(features, dimensions, order.data(), out.offsets, batch, classes, options.k);
  std::vector<A> centroids(classes * dimensions);
  std::vector<std::int64_t> live(classes);
  for (std::int64_t s = 0; s < classes; ++s) live[s] = s;
  MinDistance<A> search(centroids.data(), dimensions, live);
  FirstException failure;
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(dynamic)
    for (std::int64_t s = 0; s < classes; ++s) {
      failure.run([&] {
        write_centroid(features, dimensions, order.data(), out.offsets[s], out.offsets[s + 1],
                       centroids.data() + s * dimensions);
      });
    }
#pragma omp for schedule(dynamic) nowait
    for (std::int64_t t = 0; t < tasks.size(); ++t) failure.run([&] { tasks.run(t); });
#pragma omp for schedule(dynamic)
    for (std::int64_t block = 0; block < search.size(); ++block) {
      failure.run([&] { search.run(block); });
    }
  }
  failure.rethrow();
  const A intra = reduce_ranges(tasks, order, classes, options, out);
  const auto nearest = search.result();
  const A distance =
      options.squared ? nearest.squared_distance : square_root(nearest.squared_distance);
  const InterTerm<A> inter = inter_term(distance, static_cast<A>(options.margin),
                                        static_cast<A>(options.beta), options.squared);
  const A loss = static_cast<A>(options.alpha) * intra + inter.value;
  out.center_pair[0] = nearest.q;
  out.center_pair[1] = nearest.r;
  std::fill(out.center_gradient, out.center_gradient + dimensions, A(0));
  if (nearest.q != kNoPair) {
    row_kernels<A>().add_scaled_difference(centroids.data() + nearest.q * dimensions,
                                           centroids.data() + nearest.r * dimensions, inter.scale,
                                           out.center_gradient, dimensions);
  }
  *out.poison = loss == loss ? A(0) : loss;
  return loss;
}

}  // namespace

void range_loss_forward(const TensorView& features, const TensorView& labels,
                        const RangeLossOptions& options, const TensorView& loss,
                        const TensorView& state_index, const TensorView& state_value,
                        const TensorView&, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  require_ranges(options.k);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    *output<A>(loss, "loss", 1) = forward(
        input<T>(features, "features", batch * dimensions), index_pointer(labels, "labels", batch),
        batch, dimensions, options,
        range_loss_state<A>(state_index, state_value, batch, dimensions, options.k, kCpuDevice),
        threads(execution));
  });
}

std::int64_t range_loss_workspace(std::int64_t, std::int64_t, std::int64_t, std::int64_t) {
  return 0;
}

void range_loss_backward(const TensorView& grad_loss, const TensorView& features, std::int64_t k,
                         const TensorView& state_index, const TensorView& state_value,
                         const TensorView& grad_features, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using T = decltype(zero);
    using A = Compute<T>;
    const RangeLossState<A> state =
        range_loss_state<A>(state_index, state_value, batch, dimensions, k, kCpuDevice);
    const A grad = *input<A>(grad_loss, "grad_loss", 1);
    const A poison = *state.poison;
    const RowKernels<A>& kernels = row_kernels<A>();
    advise_huge_pages(grad_features);
    const auto begin_row = [&](std::int64_t i, A* row) {
      const std::int64_t s = state.segment[i];
      const bool ignored = s < 0;
      const bool first = s == state.center_pair[0], second = s == state.center_pair[1];
      if (!ignored && poison == A(0) && (first || second)) {
        const A share = grad / static_cast<A>(state.offsets[s + 1] - state.offsets[s]);
        kernels.scale(state.center_gradient, first ? share : -share, row, dimensions);
      } else {
        std::fill(row, row + dimensions, ignored ? A(0) : poison);
      }
    };
    write_pair_gradients(input<T>(features, "features", batch * dimensions), batch, dimensions,
                         state.segment, state.pairs, state.pair_scale, batch, k, grad,
                         output<T>(grad_features, "grad_features", batch * dimensions),
                         threads(execution), begin_row);
  });
}

}  // namespace facelt::cpu
