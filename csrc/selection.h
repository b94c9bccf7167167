// How the families choose pairs, the same on host and device. The order is total, so the result
// does not depend on how the work was split.
#pragma once

#include <cmath>

#include "scalar.h"

namespace facelt {

// A pair of sorted positions (a < b), numbered a * B + b, and its squared distance.
template <class A>
struct Candidate {
  A distance;
  std::int64_t pair;
};

constexpr std::int64_t kNoPair = -1;

// Larger distance first, NaN before all, ties to the first pair; "no pair" comes last.
template <class A>
FACELT_HOST_DEVICE bool is_larger(const Candidate<A>& x, const Candidate<A>& y) {
  if (x.pair == kNoPair || y.pair == kNoPair) return x.pair != kNoPair && y.pair == kNoPair;
  const bool x_nan = x.distance != x.distance, y_nan = y.distance != y.distance;
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x.distance != y.distance) return x.distance > y.distance;
  return x.pair < y.pair;
}

// Smaller distance first, ties to the first pair; "no pair" comes last. NaN is the caller's to
// find.
template <class A>
FACELT_HOST_DEVICE bool is_smaller(const Candidate<A>& x, const Candidate<A>& y) {
  if (x.pair == kNoPair || y.pair == kNoPair) return x.pair != kNoPair && y.pair == kNoPair;
  if (x.distance != y.distance) return x.distance < y.distance;
  return x.pair < y.pair;
}

FACELT_HOST_DEVICE float square_root(float value) { return sqrtf(value); }
FACELT_HOST_DEVICE double square_root(double value) { return sqrt(value); }

template <class A>
FACELT_HOST_DEVICE bool is_finite(A value) {
  return value - value == A(0);
}

// The harmonic mean of `number` distances in descending order (Range Loss eq. 2) and, for each, the
// factor of (x_a - x_b) in weight * d(mean)/d(x_a). Distances are divided by the smallest first:
// their reciprocals may overflow. A mean with a 0 in it is 0, and so is its gradient.
template <class A>
FACELT_HOST_DEVICE A harmonic_mean(const A* distances, std::int64_t number, bool squared, A weight,
                                   A* pair_scale) {
  const A smallest = number > 0 ? distances[number - 1] : A(0);
  if (smallest == A(0)) {
    for (std::int64_t j = 0; j < number; ++j) pair_scale[j] = A(0);
    return A(0);
  }
  A reciprocals = 0;
  for (std::int64_t j = 0; j < number; ++j) reciprocals += smallest / distances[j];
  for (std::int64_t j = 0; j < number; ++j) {
    const A ratio = smallest / distances[j] / reciprocals;
    const A slope = weight * static_cast<A>(number) * ratio * ratio;
    pair_scale[j] = squared ? 2 * slope : slope / distances[j];
  }
  return smallest * static_cast<A>(number) / reciprocals;
}

// The inter term beta * max(margin - distance, 0), and the factor of (c_q - c_r) in its gradient by
// the first centroid.
template <class A>
struct InterTerm {
  A value;
  A scale;
};

template <class A>
FACELT_HOST_DEVICE InterTerm<A> inter_term(A distance, A margin, A beta, bool squared) {
  const A gap = margin - distance;
  if (!(gap > A(0))) return {gap == gap ? A(0) : gap, A(0)};
  if (squared) return {beta * gap, -2 * beta};
  return {beta * gap, distance > A(0) ? -beta / distance : A(0)};
}

}  // namespace facelt
