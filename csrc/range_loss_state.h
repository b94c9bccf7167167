// What the forward of range_loss leaves for its backward, in two tensors; the same in every
// backend.
#pragma once

#include "scalar.h"

namespace facelt {

template <class A>
struct RangeLossState {
  std::int64_t* segment;  // [B] the class of each sample, -1 for an ignored one
  std::int64_t* offsets;  // [B + 1] where each class starts in the sorted batch
  std::int64_t* pairs;    // [B, k, 2] the samples of each class's ranges, -1 where there is none
  std::int64_t* center_pair;  // [2] the two nearest classes, or -1
  A* pair_scale;              // [B, k] each range's factor of (x_a - x_b) in the gradient of x_a
  A* center_gradient;         // [D] the gradient of the inter term by the first centroid
  A* poison;                  // [1] 0, or NaN where the loss is NaN
};

// The state that lies in the tensors `index` and `value`.
template <class A>
RangeLossState<A> range_loss_state(const TensorView& index, const TensorView& value,
                                   std::int64_t batch, std::int64_t dimensions, std::int64_t k,
                                   int device) {
  RangeLossState<A> state;
  state.segment = pointer<std::int64_t>(index, "state_index", ScalarType::kInt64,
                                        2 * batch + 1 + 2 * batch * k + 2, device);
  state.offsets = state.segment + batch;
  state.pairs = state.offsets + batch + 1;
  state.center_pair = state.pairs + 2 * batch * k;
  state.pair_scale =
      pointer<A>(value, "state_value", Scalar<A>::kType, batch * k + dimensions + 1, device);
  state.center_gradient = state.pair_scale + batch * k;
  state.poison = state.center_gradient + dimensions;
  return state;
}

}  // namespace facelt
