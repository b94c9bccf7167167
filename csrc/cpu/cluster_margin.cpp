#include <numeric>

#include "norms.h"

namespace facelt::cpu {

namespace {

// Columns that a thread takes at a time, where all samples have a part in each.
constexpr std::int64_t kColumns = 64;

const std::int64_t* checked_clusters(const TensorView& view, std::int64_t batch,
                                     std::int64_t clusters) {
  const std::int64_t* index = index_pointer(view, "cluster_index", batch);
  for (std::int64_t i = 0; i < batch; ++i) {
    if (index[i] >= 0 && index[i] < clusters) continue;
    throw std::invalid_argument("cluster_index: expected numbers in [0, " +
                                std::to_string(clusters) + "), got " + std::to_string(index[i]) +
                                " at position " + std::to_string(i));
  }
  return index;
}

// Clusters by class, and which have samples.
struct ClusterOrder {
  std::vector<std::int64_t> order;         // by class, then by number
  std::vector<std::int64_t> begins, ends;  // of each cluster's class in `order`
  std::vector<std::int64_t> empty;

  ClusterOrder(const std::int64_t* classes, const std::int64_t* counts, std::int64_t clusters)
      : order(clusters), begins(clusters), ends(clusters) {
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return classes[a] < classes[b]; });
    for (std::int64_t begin = 0, end; begin < clusters; begin = end) {
      end = begin;
      while (end < clusters && classes[order[end]] == classes[order[begin]]) ++end;
      for (std::int64_t p = begin; p < end; ++p) {
        begins[order[p]] = begin;
        ends[order[p]] = end;
      }
    }
    for (std::int64_t m = 0; m < clusters; ++m) {
      if (counts[m] == 0) empty.push_back(m);
    }
  }
};

// [margin - own + log sum exp]_+ over terms of which -infinity takes no part; the terms become its
// gradient.
template <class A>
A hinge(A* terms, std::int64_t n, A own, A margin, A* own_gradient) {
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  const SoftmaxKernels<A>& kernels = softmax_kernels<A>();
  bool any = false;
  for (std::int64_t j = 0; j < n && !any; ++j) any = terms[j] != kNothing;
  if (!any) {
    std::fill_n(terms, n, A(0));
    return A(0);
  }
  const A largest = kernels.maximum(terms, n);
  const A sum = kernels.sum_exp(terms, largest, n);
  const A exceeding = margin - own + largest + std::log(sum);
  const A active = exceeding > A(0) ? A(1) : exceeding == exceeding ? A(0) : exceeding;
  kernels.exponentials(terms, nullptr, A(1), largest, active / sum, terms, n);
  *own_gradient -= active;
  return exceeding > A(0) || exceeding != exceeding ? exceeding : A(0);
}

// One sample's row of similarities, which becomes the gradient by them.
template <class A>
class SampleHinges {
 public:
  SampleHinges(const ClusterOrder& clusters, std::int64_t count, A between, A within)
      : clusters_(clusters), count_(count), between_(between), within_(within) {}

  A run(A* similarity, std::int64_t own_cluster) {
    constexpr A kNothing = -std::numeric_limits<A>::infinity();
    const A own = similarity[own_cluster];
    const std::int64_t begin = clusters_.begins[own_cluster], end = clusters_.ends[own_cluster];
    for (std::int64_t m : clusters_.empty) similarity[m] = kNothing;
    same_class_.clear();
    for (std::int64_t p = begin; p < end; ++p) {
      const std::int64_t m = clusters_.order[p];
      same_class_.push_back(m == own_cluster ? kNothing : similarity[m]);
      similarity[m] = kNothing;
    }
    // NaN for a feature that is not finite, also where it meets no other cluster.
    const A poison = own - own;
    A own_gradient = poison;
    const A loss = poison + hinge(similarity, count_, own, between_, &own_gradient) +
                   hinge(same_class_.data(), end - begin, own, within_, &own_gradient);
    for (std::int64_t p = begin; p < end; ++p) {
      similarity[clusters_.order[p]] = same_class_[p - begin];
    }
    similarity[own_cluster] = own_gradient;
    return loss;
  }

 private:
  const ClusterOrder& clusters_;
  std::int64_t count_;
  A between_, within_;
  std::vector<A> same_class_;
};

template <class A>
std::vector<A> scaled_rows(const A* rows, const A* factors, std::int64_t count, std::int64_t n) {
  std::vector<A> scaled(count * n);
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < n; ++j) scaled[i * n + j] = factors[i] * rows[i * n + j];
  }
  return scaled;
}

}  // namespace

void cluster_centroids(const TensorView& features, const TensorView& cluster_index, bool normalize,
                       const TensorView& centroids, const TensorView& inverse_norms,
                       const TensorView& counts, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const std::int64_t* index = checked_clusters(cluster_index, batch, clusters);
  std::int64_t* sizes = index_output(counts, "counts", clusters);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* x = input<A>(features, "features", batch * dimensions);
    A* means = output<A>(centroids, "centroids", clusters * dimensions);
    A* inverses = output<A>(inverse_norms, "inverse_norms", clusters);
    std::fill_n(means, clusters * dimensions, A(0));
    std::fill_n(sizes, clusters, std::int64_t{0});
    for (std::int64_t i = 0; i < batch; ++i) ++sizes[index[i]];
#pragma omp parallel for schedule(static) num_threads(threads(execution))
    for (std::int64_t d = 0; d < dimensions; d += kColumns) {
      const std::int64_t width = std::min(kColumns, dimensions - d);
      for (std::int64_t i = 0; i < batch; ++i) {
        row_kernels<A>().add(x + i * dimensions + d, means + index[i] * dimensions + d, width);
      }
    }
    for (std::int64_t m = 0; m < clusters; ++m) {
      A* mean = means + m * dimensions;
      inverses[m] = 1;
      if (sizes[m] > 1) row_kernels<A>().divide(mean, static_cast<A>(sizes[m]), dimensions);
      if (!normalize) continue;
      inverses[m] = inverse_norm(mean, dimensions);
      row_kernels<A>().scale(mean, inverses[m], mean, dimensions);
    }
  });
}

void cluster_hinges(const TensorView& features, const TensorView& cluster_index,
                    const TensorView& cluster_class, const TensorView& centroids,
                    const TensorView& counts, double between_margin, double within_margin,
                    bool given, const TensorView& losses, const TensorView& gradient,
                    Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const std::int64_t* index = checked_clusters(cluster_index, batch, clusters);
  const ClusterOrder order(index_pointer(cluster_class, "cluster_class", clusters),
                           index_pointer(counts, "counts", clusters), clusters);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* x = input<A>(features, "features", batch * dimensions);
    const A* means = input<A>(centroids, "centroids", clusters * dimensions);
    A* out = output<A>(losses, "losses", batch);
    A* by_similarity = output<A>(gradient, "gradient", batch * clusters);
    FirstException failure;
#pragma omp parallel num_threads(threads(execution))
    failure.run([&] {
      SampleHinges<A> hinges(order, clusters, static_cast<A>(between_margin),
                             static_cast<A>(within_margin));
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < batch; ++i) {
        A* row = by_similarity + i * clusters;
        if (!given) row_kernels<A>().dots(x + i * dimensions, means, clusters, row, dimensions);
        out[i] = hinges.run(row, index[i]);
      }
    });
    failure.rethrow();
  });
}

void cluster_centroid_gradient(const TensorView& features, const TensorView& factors,
                               const TensorView& gradient, const TensorView& centroids,
                               const TensorView& inverse_norms, const TensorView& counts,
                               bool normalize, bool given, const TensorView& grad_shares,
                               Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = centroids.size(0);
  const std::int64_t* sizes = index_pointer(counts, "counts", clusters);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* x = input<A>(features, "features", batch * dimensions);
    const A* upstream = input<A>(factors, "factors", batch);
    const A* by_similarity = input<A>(gradient, "gradient", batch * clusters);
    const A* means = input<A>(centroids, "centroids", clusters * dimensions);
    const A* inverses = input<A>(inverse_norms, "inverse_norms", clusters);
    A* shares = output<A>(grad_shares, "grad_shares", clusters * dimensions);
    if (!given) {
      const std::vector<A> weights = scaled_rows(by_similarity, upstream, batch, clusters);
#pragma omp parallel for schedule(static) num_threads(threads(execution))
      for (std::int64_t d = 0; d < dimensions; d += kColumns) {
        row_kernels<A>().transposed_product(x + d, weights.data(), batch, clusters, shares + d,
                                            std::min(kColumns, dimensions - d), dimensions);
      }
    }
#pragma omp parallel for schedule(static) num_threads(threads(execution)) if (clusters > 64)
    for (std::int64_t m = 0; m < clusters; ++m) {
      if (sizes[m] == 0) continue;
      A* share = shares + m * dimensions;
      const A scale = inverses[m] / static_cast<A>(sizes[m]);
      if (normalize) {
        row_kernels<A>().project(share, means + m * dimensions, A(1), scale, share, dimensions);
      } else {
        row_kernels<A>().scale(share, scale, share, dimensions);
      }
    }
  });
}

void cluster_feature_gradient(const TensorView& factors, const TensorView& cluster_index,
                              const TensorView& gradient, const TensorView& centroids,
                              const TensorView& grad_shares, bool given,
                              const TensorView& grad_features, Execution execution) {
  const std::int64_t batch = factors.numel(), clusters = centroids.size(0);
  const std::int64_t dimensions = centroids.size(1);
  const std::int64_t* index = checked_clusters(cluster_index, batch, clusters);
  dispatch_floating(centroids.dtype, "centroids", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* upstream = input<A>(factors, "factors", batch);
    const A* by_similarity = input<A>(gradient, "gradient", batch * clusters);
    const A* means = input<A>(centroids, "centroids", clusters * dimensions);
    const A* shares = input<A>(grad_shares, "grad_shares", clusters * dimensions);
    A* out = output<A>(grad_features, "grad_features", batch * dimensions);
    std::vector<A> weights;
    if (!given) weights = scaled_rows(by_similarity, upstream, batch, clusters);
#pragma omp parallel for schedule(static) num_threads(threads(execution))
    for (std::int64_t i = 0; i < batch; ++i) {
      A* grad = out + i * dimensions;
      const A* share = shares + index[i] * dimensions;
      if (given) {
        row_kernels<A>().scale(grad, upstream[i], grad, dimensions);
        row_kernels<A>().add(share, grad, dimensions);
      } else {
        row_kernels<A>().weighted_sum(share, means, weights.data() + i * clusters, clusters, grad,
                                      dimensions);
      }
    }
  });
}

}  // namespace facelt::cpu
