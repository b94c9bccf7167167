#include "../quintuplets.h"

#include <numeric>

#include "common.h"
#include "pair_blocks.h"

namespace facelt::cpu {

namespace {

template <class A>
struct Samples {
  const A* features;
  const std::int64_t *labels, *clusters;
  std::int64_t batch, dimensions;

  const A* row(std::int64_t i) const { return features + i * dimensions; }
};

// The neighbors of all anchors; samples are numbered by their positions in `order`, which leaves
// out the ignored ones and is ascending. Each thread keeps those that it has met, and the order
// among candidates is total: what is found in the end does not depend on who met what.
//
// |x|^2 + |y|^2 - 2 x.y, in half the time of a distance, says how far a pair is to within some
// roundings. Nearly all pairs are neither as near nor as far as to matter; of the others the sum of
// squared differences decides, which does not cancel.
template <class A>
class Mining {
 public:
  Mining(const Samples<A>& samples, const std::vector<std::int64_t>& order, int threads)
      : s_(samples),
        order_(order),
        count_(static_cast<std::int64_t>(order.size())),
        threads_(threads),
        slack_((2 * samples.dimensions + 8) * std::numeric_limits<A>::epsilon()),
        found_(threads * count_ * kNeighbors),
        nearest_(threads * count_, kInfinity) {
    labels_.reserve(count_);
    clusters_.reserve(count_);
    squares_.reserve(count_);
    for (const std::int64_t i : order) {
      labels_.push_back(s_.labels[i]);
      clusters_.push_back(s_.clusters[i]);
      squares_.push_back(row_kernels<A>().dot(s_.row(i), s_.row(i), s_.dimensions));
    }
    for (std::size_t f = 0; f < found_.size(); ++f) {
      found_[f] = {is_farthest(f % kNeighbors) ? -kInfinity : kInfinity, kNoPair};
    }
  }

  std::int64_t size() const { return number_of_blocks(count_); }

  void run(std::int64_t block) {
    Candidate<A>* const found = found_.data() + omp_get_thread_num() * count_ * kNeighbors;
    A* const nearest = nearest_.data() + omp_get_thread_num() * count_;
    visit_pair_block(
        s_.features, s_.dimensions, order_.data(), 0, count_, block,
        [&](std::int64_t a, std::int64_t b, A product) {
          const A squares = squares_[a] + squares_[b];
          const A about = squares - 2 * product, off = slack_ * squares;
          if (labels_[a] != labels_[b]) {
            if (about - off > nearest[a] && about - off > nearest[b]) return;
            const A distance = distance_of(a, b);
            offer(kOtherNearest, {distance, b}, found + a * kNeighbors);
            offer(kOtherNearest, {distance, a}, found + b * kNeighbors);
            nearest[a] = found[a * kNeighbors + kOtherNearest].distance;
            nearest[b] = found[b * kNeighbors + kOtherNearest].distance;
            return;
          }
          const bool same_cluster = clusters_[a] == clusters_[b];
          Candidate<A>*const of_a = found + a * kNeighbors, *const of_b = found + b * kNeighbors;
          if (!may_matter(same_cluster, about, off, of_a) &&
              !may_matter(same_cluster, about, off, of_b)) {
            return;
          }
          const A distance = distance_of(a, b);
          offer(true, same_cluster, {distance, b}, of_a);
          offer(true, same_cluster, {distance, a}, of_b);
        },
        row_kernels<A>().inner_products);
  }

  // After all blocks have run; positions.
  const Candidate<A>* neighbors(std::int64_t anchor) {
    Candidate<A>* const merged = found_.data() + anchor * kNeighbors;
    for (int t = 1; t < threads_; ++t) {
      for (int k = 0; k < kNeighbors; ++k) {
        offer(k, merged[t * count_ * kNeighbors + k], merged);
      }
    }
    return merged;
  }

 private:
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  // Of a pair of one class. What is not a number may matter.
  static bool may_matter(bool same_cluster, A about, A off, const Candidate<A>* found) {
    if (!(about + off < found[kClassFarthest].distance)) return true;
    if (same_cluster) return !(about + off < found[kClusterFarthest].distance);
    return !(about - off > found[kClassNearest].distance);
  }

  A distance_of(std::int64_t a, std::int64_t b) const {
    return row_kernels<A>().squared_distance(s_.row(order_[a]), s_.row(order_[b]), s_.dimensions);
  }

  const Samples<A> s_;
  const std::vector<std::int64_t>& order_;
  std::int64_t count_;
  int threads_;
  A slack_;
  std::vector<std::int64_t> labels_, clusters_;
  std::vector<A> squares_;
  std::vector<Candidate<A>> found_;
  std::vector<A> nearest_;  // the distances of kOtherNearest, side by side
};

// The samples that take part. Fills in what the others leave.
template <class A>
std::vector<std::int64_t> taking_part(const Samples<A>& s, const QuintupletOptions& options,
                                      const QuintupletState<A>& state, A* loss) {
  std::vector<std::int64_t> order;
  order.reserve(s.batch);
  for (std::int64_t i = 0; i < s.batch; ++i) {
    if (!options.ignored.marks(s.labels[i])) {
      order.push_back(i);
      continue;
    }
    std::fill_n(state.neighbors + i * kNeighbors, std::int64_t{kNeighbors}, kIgnoredSample);
    std::fill_n(state.slopes + i * kNeighbors, std::int64_t{kNeighbors}, A(0));
    if (options.reduction == Reduction::kNone) loss[i] = A(0);
  }
  return order;
}

template <class A>
void forward(const Samples<A>& s, const QuintupletOptions& options, const QuintupletState<A>& state,
             A* loss, int threads) {
  const std::vector<std::int64_t> order = taking_part(s, options, state, loss);
  Mining<A> mining(s, order, threads);
  FirstException failure;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t block = 0; block < mining.size(); ++block) {
    failure.run([&] { mining.run(block); });
  }
  failure.rethrow();
  const A margins[] = {static_cast<A>(options.margins[0]), static_cast<A>(options.margins[1]),
                       static_cast<A>(options.margins[2])};
  const bool finite = std::all_of(order.begin(), order.end(), [&](std::int64_t i) {
    return row_kernels<A>().all_finite(s.row(i), s.dimensions);
  });
  *state.poison = finite ? A(0) : std::numeric_limits<A>::quiet_NaN();
  double sum = 0;
  std::int64_t anchors = 0;
  for (std::size_t p = 0; p < order.size(); ++p) {
    const std::int64_t i = order[p];
    const Candidate<A>* found = mining.neighbors(static_cast<std::int64_t>(p));
    const Hinges<A> hinges = quintuplet_hinges(found, margins, state.slopes + i * kNeighbors);
    for (int k = 0; k < kNeighbors; ++k) {
      state.neighbors[i * kNeighbors + k] = found[k].pair < 0 ? kNoPair : order[found[k].pair];
    }
    anchors += hinges.any;
    sum += hinges.loss;
    if (options.reduction == Reduction::kNone) loss[i] = hinges.loss + *state.poison;
  }
  *state.anchors = static_cast<A>(anchors);
  if (options.reduction == Reduction::kNone) return;
  const bool mean = options.reduction == Reduction::kMean && anchors > 0;
  *loss = static_cast<A>(mean ? sum / static_cast<double>(anchors) : sum) + *state.poison;
}

// Where each sample is an anchor's neighbor, as numbers of places in [B, 4], ascending.
struct Places {
  std::vector<std::int64_t> offsets, places;

  Places(const std::int64_t* neighbors, std::int64_t batch) : offsets(batch + 1) {
    const std::int64_t count = batch * kNeighbors;
    for (std::int64_t p = 0; p < count; ++p) {
      if (is_sample(neighbors[p], batch)) ++offsets[neighbors[p] + 1];
    }
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    places.resize(offsets[batch]);
    std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
    for (std::int64_t p = 0; p < count; ++p) {
      if (is_sample(neighbors[p], batch)) places[next[neighbors[p]]++] = p;
    }
  }

  static bool is_sample(std::int64_t i, std::int64_t batch) { return i >= 0 && i < batch; }
};

}  // namespace

void quintuplet_forward(const TensorView& features, const TensorView& labels,
                        const TensorView& cluster_index, const QuintupletOptions& options,
                        const TensorView& loss, const TensorView& neighbors,
                        const TensorView& state, const TensorView&, Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const Samples<A> samples{
        input<A>(features, "features", batch * dimensions), index_pointer(labels, "labels", batch),
        index_pointer(cluster_index, "cluster_index", batch), batch, dimensions};
    forward(samples, options, quintuplet_state<A>(neighbors, state, batch, kCpuDevice),
            output<A>(loss, "loss", number_of_losses(options.reduction, batch)),
            threads(execution));
  });
}

std::int64_t quintuplet_workspace(std::int64_t, std::int64_t) { return 0; }

void quintuplet_backward(const TensorView& grad_loss, const TensorView& features,
                         const QuintupletOptions& options, const TensorView& neighbors,
                         const TensorView& state, const TensorView& grad_features,
                         Execution execution) {
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  dispatch_floating(features.dtype, "features", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* x = input<A>(features, "features", batch * dimensions);
    const QuintupletState<A> s = quintuplet_state<A>(neighbors, state, batch, kCpuDevice);
    const A* upstream =
        input<A>(grad_loss, "grad_loss", number_of_losses(options.reduction, batch));
    A* grad = output<A>(grad_features, "grad_features", batch * dimensions);
    const Places places(s.neighbors, batch);
    // The gradient by x_i of a distance between i and another sample.
    const auto add = [&](std::int64_t i, std::int64_t other, std::int64_t place) {
      if (s.slopes[place] == A(0)) return;
      const A factor = anchor_gradient(options.reduction, upstream, *s.anchors, place / kNeighbors);
      row_kernels<A>().add_scaled_difference(x + i * dimensions, x + other * dimensions,
                                             2 * factor * s.slopes[place], grad + i * dimensions,
                                             dimensions);
    };
#pragma omp parallel for schedule(static) num_threads(threads(execution))
    for (std::int64_t i = 0; i < batch; ++i) {
      std::fill_n(grad + i * dimensions, dimensions, s.poison_of(i));
      for (std::int64_t p = i * kNeighbors; p < (i + 1) * kNeighbors; ++p) {
        if (Places::is_sample(s.neighbors[p], batch)) add(i, s.neighbors[p], p);
      }
      for (std::int64_t p = places.offsets[i]; p < places.offsets[i + 1]; ++p) {
        add(i, places.places[p] / kNeighbors, places.places[p]);
      }
    }
  });
}

}  // namespace facelt::cpu
