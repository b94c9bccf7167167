// The cluster margin loss: its options, and what the forward leaves for the backward; the same in
// every backend.
#pragma once

#include <stdexcept>
#include <string>

#include "reduction.h"
#include "scalar.h"

namespace facelt {

struct ClusterMarginOptions {
  double between_margin;
  double within_margin;
  bool normalize;
  Reduction reduction;
};

// With many clusters the matrix products are made between two calls; with few, one call does all.
enum class Part : int { kWhole, kBeforeProducts, kAfterProducts };

inline Part checked_part(int part) {
  if (part >= 0 && part <= 2) return static_cast<Part>(part);
  throw std::invalid_argument("part: expected 0, 1 or 2, got " + std::to_string(part));
}

template <class A>
struct ClusterMarginState {
  A* gradient;           // [B, M] of the loss by the inner products of samples and centroids
  A* centroids;          // [M, D] zeros where a cluster has no sample
  A* inverse_norms;      // [M] of the means, ones if centroids are not normalized
  std::int64_t* counts;  // [M + 1] samples, then the ticket
  unsigned* ticket;      // CUDA's, for the block that comes last; 0 elsewhere
};

template <class A>
ClusterMarginState<A> cluster_margin_state(const TensorView& value, const TensorView& counts,
                                           std::int64_t batch, std::int64_t clusters,
                                           std::int64_t dimensions, int device) {
  ClusterMarginState<A> state;
  state.gradient = pointer<A>(value, "state", Scalar<A>::kType,
                              batch * clusters + clusters * dimensions + clusters, device);
  state.centroids = state.gradient + batch * clusters;
  state.inverse_norms = state.centroids + clusters * dimensions;
  state.counts = pointer<std::int64_t>(counts, "counts", ScalarType::kInt64, clusters + 1, device);
  state.ticket = reinterpret_cast<unsigned*>(state.counts + clusters);
  return state;
}

// What a sample's gradient is multiplied with, but for its weight.
template <class A>
A share_of_sample(const ClusterMarginOptions& options, std::int64_t batch) {
  return options.reduction == Reduction::kMean && batch > 0 ? A(1) / static_cast<A>(batch) : A(1);
}

}  // namespace facelt
