// The quintuplet loss: which neighbors an anchor has, its hinges, and what the forward leaves for
// the backward; the same on host and device.
#pragma once

#include "ignored_label.h"
#include "reduction.h"
#include "selection.h"

namespace facelt {

struct QuintupletOptions {
  double margins[3];
  Reduction reduction;
  IgnoredLabel ignored;
};

// The farthest of its cluster, the nearest of its class in another cluster, the farthest of its
// class, the nearest of another class.
enum Neighbor { kClusterFarthest, kClassNearest, kClassFarthest, kOtherNearest, kNeighbors };

// In place of its neighbors: the sample is ignored.
constexpr std::int64_t kIgnoredSample = -2;

FACELT_HOST_DEVICE bool is_farthest(int neighbor) {
  return neighbor == kClusterFarthest || neighbor == kClassFarthest;
}

template <class A>
FACELT_HOST_DEVICE bool precedes(int neighbor, const Candidate<A>& x, const Candidate<A>& y) {
  return is_farthest(neighbor) ? is_larger(x, y) : is_smaller(x, y);
}

template <class A>
FACELT_HOST_DEVICE void offer(int neighbor, const Candidate<A>& candidate, Candidate<A>* found) {
  if (precedes(neighbor, candidate, found[neighbor])) found[neighbor] = candidate;
}

// A candidate's pair is the number of the sample that it is, other than the anchor.
template <class A>
FACELT_HOST_DEVICE void offer(bool same_class, bool same_cluster, const Candidate<A>& candidate,
                              Candidate<A>* found) {
  if (!same_class) return offer(kOtherNearest, candidate, found);
  offer(kClassFarthest, candidate, found);
  // Indices that the compiler knows keep `found` in registers.
  if (same_cluster) return offer(kClusterFarthest, candidate, found);
  offer(kClassNearest, candidate, found);
}

// The loss of an anchor, and its slopes by the distances of its neighbors.
template <class A>
struct Hinges {
  A loss;
  bool any;
};

template <class A>
FACELT_HOST_DEVICE Hinges<A> quintuplet_hinges(const Candidate<A>* found, const A* margins,
                                               A* slopes) {
  Hinges<A> result{A(0), false};
  for (int k = 0; k < kNeighbors; ++k) slopes[k] = A(0);
  for (int h = 0; h < 3; ++h) {
    const Candidate<A>&near = found[h], &far = found[h + 1];
    if (near.pair == kNoPair || far.pair == kNoPair) continue;
    result.any = true;
    const A exceeding = margins[h] + near.distance - far.distance;
    if (exceeding <= A(0)) continue;
    const A active = exceeding == exceeding ? A(1) : exceeding;
    slopes[h] += active;
    slopes[h + 1] -= active;
    result.loss += exceeding;
  }
  return result;
}

template <class A>
struct QuintupletState {
  std::int64_t* neighbors;  // [B, 4] samples, -1 for none, or kIgnoredSample
  A* slopes;                // [B, 4] of the anchor's loss by their squared distances
  A* anchors;               // [1] how many have a hinge
  A* poison;                // [1] 0, or NaN where a feature is not finite

  FACELT_HOST_DEVICE A poison_of(std::int64_t sample) const {
    return neighbors[sample * kNeighbors] == kIgnoredSample ? A(0) : *poison;
  }
};

template <class A>
QuintupletState<A> quintuplet_state(const TensorView& neighbors, const TensorView& value,
                                    std::int64_t batch, int device) {
  QuintupletState<A> state;
  state.neighbors =
      pointer<std::int64_t>(neighbors, "neighbors", ScalarType::kInt64, kNeighbors * batch, device);
  state.slopes = pointer<A>(value, "state", Scalar<A>::kType, kNeighbors * batch + 2, device);
  state.anchors = state.slopes + kNeighbors * batch;
  state.poison = state.anchors + 1;
  return state;
}

// What an anchor's slopes are multiplied with for the gradient by its distances.
template <class A>
FACELT_HOST_DEVICE A anchor_gradient(Reduction reduction, const A* grad_loss, A anchors,
                                     std::int64_t anchor) {
  if (reduction == Reduction::kNone) return grad_loss[anchor];
  return reduction == Reduction::kMean && anchors > A(0) ? *grad_loss / anchors : *grad_loss;
}

}  // namespace facelt
