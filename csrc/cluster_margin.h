// The cluster margin loss: its options, and what the forward leaves for the backward; the same in
// every backend.
#pragma once

#include <stdexcept>
#include <string>

#include "ignored_label.h"
#include "reduction.h"
#include "scalar.h"

namespace facelt {

struct ClusterMarginOptions {
  double between_margin;
  double within_margin;
  bool normalize;
  Reduction reduction;
  IgnoredLabel ignored;  // in place of a cluster's number
};

// With many clusters the matrix products are made between two calls; with few, one call does all.
enum class Part : int { kWhole, kBeforeProducts, kAfterProducts };

inline Part checked_part(int part) {
  if (part >= 0 && part <= 2) return static_cast<Part>(part);
  throw std::invalid_argument("part: expected 0, 1 or 2, got " + std::to_string(part));
}

template <class A>
struct ClusterMarginState {
  A* gradient;       // [B, M] of the loss by the inner products of samples and centroids
  A* centroids;      // [M, D] zeros where a cluster has no sample
  A* inverse_norms;  // [M] of the means, ones if centroids are not normalized
  A* sizes;          // [M + 1] numbers of samples, then the ticket's place
  unsigned* ticket;  // CUDA's, for the block that comes last
  A* taking_part;    // [1] how many samples are not ignored
};

// M, of which the state of B samples of D dimensions is.
inline std::int64_t cluster_margin_clusters(const TensorView& state, std::int64_t batch,
                                            std::int64_t dimensions) {
  return (state.numel() - 2) / (batch + dimensions + 2);
}

template <class A>
ClusterMarginState<A> cluster_margin_state(const TensorView& value, std::int64_t batch,
                                           std::int64_t clusters, std::int64_t dimensions,
                                           int device) {
  ClusterMarginState<A> state;
  state.gradient =
      pointer<A>(value, "state", Scalar<A>::kType, (batch + dimensions + 2) * clusters + 2, device);
  state.centroids = state.gradient + batch * clusters;
  state.inverse_norms = state.centroids + clusters * dimensions;
  state.sizes = state.inverse_norms + clusters;
  state.ticket = reinterpret_cast<unsigned*>(state.sizes + clusters);
  state.taking_part = state.sizes + clusters + 1;
  return state;
}

// What a sample's gradient is multiplied with, but for its weight.
template <class A>
FACELT_HOST_DEVICE A share_of_sample(Reduction reduction, A taking_part) {
  return reduction == Reduction::kMean && taking_part > A(0) ? A(1) / taking_part : A(1);
}

}  // namespace facelt
