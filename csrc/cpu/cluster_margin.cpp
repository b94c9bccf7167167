#include "../cluster_margin.h"

#include <memory>
#include <numeric>

#include "block_hinges.h"
#include "centroids.h"
#include "norms.h"

namespace facelt::cpu {

namespace {

constexpr std::int64_t kMostSamples = 64;

// The batch in chunks of about as many samples, whatever the threads, so that sums over the samples
// are always added up alike.
class Chunks {
 public:
  explicit Chunks(std::int64_t batch)
      : batch_(batch),
        count_((batch + kMostSamples - 1) / kMostSamples),
        size_(count_ ? (batch + count_ - 1) / count_ : 0) {}

  std::int64_t count() const { return count_; }
  std::int64_t begin(std::int64_t chunk) const { return std::min(chunk * size_, batch_); }
  std::int64_t size(std::int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }

 private:
  std::int64_t batch_, count_, size_;
};

const std::int64_t* checked_clusters(const TensorView& view, std::int64_t batch,
                                     std::int64_t clusters, IgnoredLabel ignored) {
  const std::int64_t* index = index_pointer(view, "cluster_index", batch);
  for (std::int64_t i = 0; i < batch; ++i) {
    if (index[i] >= 0 && index[i] < clusters) continue;
    if (ignored.marks(index[i]) && clusters > 0) continue;
    const std::string allowed = ignored.given ? " or " + std::to_string(ignored.label) : "";
    throw std::invalid_argument("cluster_index: expected numbers in [0, " +
                                std::to_string(clusters) + ")" + allowed + ", got " +
                                std::to_string(index[i]) + " at position " + std::to_string(i));
  }
  return index;
}

// The clusters' classes, numbered anew; -1 where a cluster has no samples.
template <class A>
std::vector<A> numbered_classes(const std::int64_t* classes, const A* sizes,
                                std::int64_t clusters) {
  std::vector<std::int64_t> sorted(classes, classes + clusters);
  std::sort(sorted.begin(), sorted.end());
  std::vector<A> numbers(clusters, A(-1));
  for (std::int64_t m = 0; m < clusters; ++m) {
    const auto place = std::lower_bound(sorted.begin(), sorted.end(), classes[m]);
    if (sizes[m] > A(0)) numbers[m] = static_cast<A>(place - sorted.begin());
  }
  return numbers;
}

template <class A>
struct Batch {
  const A* features;
  const std::int64_t* cluster_index;
  std::int64_t batch, clusters, dimensions;
  ClusterMarginOptions options;
  ClusterMarginState<A> state;
  int threads;

  bool is_ignored(std::int64_t i) const { return options.ignored.marks(cluster_index[i]); }
};

// Its member functions share their work among the threads of the region they are called in.
template <class A>
class Forward {
 public:
  Forward(const Batch<A>& batch, const std::int64_t* cluster_class, const A* weights, A* losses,
          Part part)
      : b_(batch), weights_(weights), losses_(losses), given_(part == Part::kAfterProducts) {
    if (!given_) sort_samples();
    if (part == Part::kBeforeProducts) return;
    classes_ = numbered_classes<A>(cluster_class, b_.state.sizes, b_.clusters);
  }

  void centroids() {
    const std::int64_t dimensions = b_.dimensions;
#pragma omp for schedule(static)
    for (std::int64_t m = 0; m < b_.clusters; ++m) {
      A* const mean = b_.state.centroids + m * dimensions;
      write_centroid(b_.features, dimensions, order_.data(), offsets_[m], offsets_[m + 1], mean);
      b_.state.inverse_norms[m] = b_.options.normalize ? inverse_norm(mean, dimensions) : A(1);
      if (!b_.options.normalize) continue;
      row_kernels<A>().scale(mean, b_.state.inverse_norms[m], mean, dimensions);
    }
  }

  void hinges() {
    constexpr std::int64_t kSamples = BlockHinges<A>::kSamples;
    BlockHinges<A> hinges(classes_, b_.options,
                          share_of_sample(b_.options.reduction, *b_.state.taking_part));
#pragma omp for schedule(static) nowait
    for (std::int64_t first = 0; first < b_.batch; first += kSamples) {
      const std::int64_t count = std::min(kSamples, b_.batch - first);
      A* const gradients = b_.state.gradient + first * b_.clusters;
      if (given_) {
        for (std::int64_t e = 0; e < count * b_.clusters; ++e) {
          hinges.term(e / b_.clusters, e % b_.clusters) = gradients[e];
        }
      } else {
        multiply(first, count, hinges);
      }
      hinges.run(count, b_.cluster_index + first, weights_ ? weights_ + first : nullptr, gradients,
                 losses_ + first);
    }
  }

 private:
  void sort_samples() {
    offsets_.resize(b_.clusters + 1);
    order_.resize(b_.batch);
    for (std::int64_t i = 0; i < b_.batch; ++i) {
      if (!b_.is_ignored(i)) ++offsets_[b_.cluster_index[i] + 1];
    }
    std::copy(offsets_.begin() + 1, offsets_.end(), b_.state.sizes);
    b_.state.sizes[b_.clusters] = A(0);
    std::partial_sum(offsets_.begin(), offsets_.end(), offsets_.begin());
    *b_.state.taking_part = static_cast<A>(offsets_[b_.clusters]);
    std::vector<std::int64_t> next(offsets_.begin(), offsets_.end() - 1);
    for (std::int64_t i = 0; i < b_.batch; ++i) {
      if (!b_.is_ignored(i)) order_[next[b_.cluster_index[i]]++] = i;
    }
  }

  void multiply(std::int64_t first, std::int64_t count, BlockHinges<A>& hinges) {
    const A *rows[kTile], *centroids[kTile];
    A products[kTile * kTile];
    for (std::int64_t i = 0; i < count; i += kTile) {
      tile_rows(b_.features + first * b_.dimensions, i, count, rows);
      for (std::int64_t m = 0; m < b_.clusters; m += kTile) {
        const std::int64_t clusters = tile_rows(b_.state.centroids, m, b_.clusters, centroids);
        row_kernels<A>().inner_products(centroids, rows, b_.dimensions, products);
        for (std::int64_t j = 0; j < clusters; ++j) {
          std::copy_n(products + kTile * j, kTile, &hinges.term(i, m + j));
        }
      }
    }
  }

  // The rows of a tile, the last one repeated. Returns how many there are.
  std::int64_t tile_rows(const A* x, std::int64_t begin, std::int64_t end, const A** rows) const {
    const std::int64_t count = std::min<std::int64_t>(kTile, end - begin);
    for (std::int64_t i = 0; i < kTile; ++i) {
      rows[i] = x + (begin + std::min(i, count - 1)) * b_.dimensions;
    }
    return count;
  }

  const Batch<A> b_;
  const A* weights_;
  A* losses_;
  bool given_;
  std::vector<std::int64_t> order_, offsets_;  // the samples by cluster, and where each begins
  std::vector<A> classes_;
};

// As of Forward.
template <class A>
class Backward {
 public:
  Backward(const Batch<A>& batch, const A* grad_loss, A* grad_centroids, A* grad_features,
           Part part)
      : b_(batch),
        grad_centroids_(grad_centroids),
        grad_features_(grad_features),
        given_(part == Part::kAfterProducts),
        chunks_(batch.batch) {
    if (given_) return;
    put_zeros_for_ignored();
    gradient_.reset(new A[b_.batch * b_.clusters]);
    sums_.reset(new A[chunks_.count() * b_.clusters * b_.dimensions]);
    const RowKernels<A>& kernels = row_kernels<A>();
    if (b_.options.reduction != Reduction::kNone) {
      kernels.scale(b_.state.gradient, *grad_loss, gradient_.get(), b_.batch * b_.clusters);
      return;
    }
    for (std::int64_t i = 0; i < b_.batch; ++i) {
      kernels.scale(b_.state.gradient + i * b_.clusters, b_.is_ignored(i) ? A(0) : grad_loss[i],
                    gradient_.get() + i * b_.clusters, b_.clusters);
    }
  }

  void centroids() {
    if (!given_) multiply();
    const RowKernels<A>& kernels = row_kernels<A>();
    const std::int64_t dimensions = b_.dimensions;
#pragma omp for schedule(static)
    for (std::int64_t m = 0; m < b_.clusters; ++m) {
      A* const grad = grad_centroids_ + m * dimensions;
      if (!given_) add_up(m, grad);
      if (b_.options.normalize) {
        kernels.project(grad, b_.state.centroids + m * dimensions, A(1), share_of_sample(m), grad,
                        dimensions);
      } else {
        kernels.scale(grad, share_of_sample(m), grad, dimensions);
      }
    }
  }

  void features() {
#pragma omp for schedule(static) nowait
    for (std::int64_t chunk = 0; chunk < chunks_.count(); ++chunk) {
      const std::int64_t first = chunks_.begin(chunk), count = chunks_.size(chunk);
      A* const grad = grad_features_ + first * b_.dimensions;
      const A* shares[kMostSamples];
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t m = b_.is_ignored(first + j) ? 0 : b_.cluster_index[first + j];
        shares[j] = grad_centroids_ + m * b_.dimensions;
      }
      if (given_) {
        for (std::int64_t j = 0; j < count; ++j) {
          row_kernels<A>().add(shares[j], grad + j * b_.dimensions, b_.dimensions);
        }
      } else {
        row_kernels<A>().product({gradient_.get() + first * b_.clusters, b_.clusters, 1,
                                  b_.state.centroids, b_.dimensions, shares, grad, b_.dimensions,
                                  count, b_.clusters, b_.dimensions});
      }
      for (std::int64_t j = 0; j < count; ++j) {
        if (b_.is_ignored(first + j)) std::fill_n(grad + j * b_.dimensions, b_.dimensions, A(0));
      }
    }
  }

 private:
  // The products take all features, and 0 times one that is not finite would be NaN.
  void put_zeros_for_ignored() {
    if (*b_.state.taking_part == static_cast<A>(b_.batch)) return;
    features_.assign(b_.features, b_.features + b_.batch * b_.dimensions);
    for (std::int64_t i = 0; i < b_.batch; ++i) {
      if (!b_.is_ignored(i)) continue;
      std::fill_n(features_.begin() + i * b_.dimensions, b_.dimensions, A(0));
    }
    b_.features = features_.data();
  }

  // The gradient by the centroids, of each chunk of the batch.
  void multiply() {
#pragma omp for schedule(static)
    for (std::int64_t chunk = 0; chunk < chunks_.count(); ++chunk) {
      const std::int64_t first = chunks_.begin(chunk);
      row_kernels<A>().product({gradient_.get() + first * b_.clusters, 1, b_.clusters,
                                b_.features + first * b_.dimensions, b_.dimensions, nullptr,
                                sums_.get() + chunk * b_.clusters * b_.dimensions, b_.dimensions,
                                b_.clusters, chunks_.size(chunk), b_.dimensions});
    }
  }

  void add_up(std::int64_t m, A* grad) const {
    std::fill(grad, grad + b_.dimensions, A(0));
    for (std::int64_t chunk = 0; chunk < chunks_.count(); ++chunk) {
      row_kernels<A>().add(sums_.get() + (chunk * b_.clusters + m) * b_.dimensions, grad,
                           b_.dimensions);
    }
  }

  // What a sample of a cluster gets of the gradient by its centroid.
  A share_of_sample(std::int64_t m) const {
    const A size = b_.state.sizes[m];
    return size > A(0) ? b_.state.inverse_norms[m] / size : A(0);
  }

  Batch<A> b_;
  A* grad_centroids_;
  A* grad_features_;
  bool given_;
  Chunks chunks_;
  std::vector<A> features_;        // with zeros for ignored samples, where there are any
  std::unique_ptr<A[]> gradient_;  // grad_loss times the state's
  std::unique_ptr<A[]> sums_;      // [chunks, M, D] of G^T features
};

template <class A>
Batch<A> batch_of(const TensorView& features, const TensorView& cluster_index,
                  const ClusterMarginOptions& options, const TensorView& state,
                  Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t clusters = cluster_margin_clusters(state, batch, dimensions);
  return {input<A>(features, "features", batch * dimensions),
          checked_clusters(cluster_index, batch, clusters, options.ignored),
          batch,
          clusters,
          dimensions,
          options,
          cluster_margin_state<A>(state, batch, clusters, dimensions, kCpuDevice),
          threads(execution)};
}

template <class A>
void reduce(const Batch<A>& b, const A* losses, const A* weights, A* loss) {
  const auto weighted = [&](std::int64_t i) {
    return weights && !b.is_ignored(i) ? weights[i] * losses[i] : losses[i];
  };
  if (b.options.reduction == Reduction::kNone) {
    for (std::int64_t i = 0; i < b.batch; ++i) loss[i] = weighted(i);
    return;
  }
  double sum = 0;
  for (std::int64_t i = 0; i < b.batch; ++i) sum += weighted(i);
  const double count = static_cast<double>(*b.state.taking_part);
  const bool mean = b.options.reduction == Reduction::kMean && count > 0;
  *loss = static_cast<A>(mean ? sum / count : sum);
}

}  // namespace

void cluster_margin_forward(const TensorView& features, const TensorView& cluster_index,
                            const TensorView& cluster_class,
                            const std::optional<TensorView>& sample_weight,
                            const ClusterMarginOptions& options, int part, const TensorView& loss,
                            const TensorView& losses, const TensorView& state,
                            Execution execution) {
  const Part step = checked_part(part);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const Batch<A> b = batch_of<A>(features, cluster_index, options, state, execution);
    const A* weights = sample_weight ? input<A>(*sample_weight, "sample_weight", b.batch) : nullptr;
    A* of_samples = output<A>(losses, "losses", b.batch);
    A* reduced = output<A>(loss, "loss", number_of_losses(options.reduction, b.batch));
    FirstException failure;
    Forward<A> forward(b, index_pointer(cluster_class, "cluster_class", b.clusters), weights,
                       of_samples, step);
#pragma omp parallel num_threads(b.threads)
    {
      if (step != Part::kAfterProducts) forward.centroids();
      if (step != Part::kBeforeProducts) failure.run([&] { forward.hinges(); });
    }
    failure.rethrow();
    if (step != Part::kBeforeProducts) reduce(b, of_samples, weights, reduced);
  });
}

void cluster_margin_backward(const TensorView& grad_loss, const TensorView& features,
                             const TensorView& cluster_index, const ClusterMarginOptions& options,
                             int part, const TensorView& state, const TensorView& grad_centroids,
                             const TensorView& grad_features, Execution execution) {
  const Part step = checked_part(part);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const Batch<A> b = batch_of<A>(features, cluster_index, options, state, execution);
    Backward<A> backward(
        b, input<A>(grad_loss, "grad_loss", number_of_losses(options.reduction, b.batch)),
        output<A>(grad_centroids, "grad_centroids", b.clusters * b.dimensions),
        output<A>(grad_features, "grad_features", b.batch * b.dimensions), step);
#pragma omp parallel num_threads(b.threads)
    {
      backward.centroids();
      backward.features();
    }
  });
}

}  // namespace facelt::cpu
