// The margin softmax's target logit and what it needs of a sample and its class, the same on host
// and device.
#pragma once

#include <math.h>

#include "scalar.h"

namespace facelt {

struct MarginSoftmaxOptions {
  double scale;
  std::int64_t angular_multiplier;
  bool normalize_features;
  bool normalize_weight;
  std::int64_t class_offset;  // of the first row of the weight
  std::int64_t num_classes;   // of all shards
  std::int64_t ignore_index;
};

enum class LabelKind { kOwn, kForeign, kIgnored, kInvalid };

FACELT_HOST_DEVICE LabelKind label_kind(std::int64_t label, std::int64_t rows,
                                        const MarginSoftmaxOptions& options) {
  if (label == options.ignore_index) return LabelKind::kIgnored;
  if (label < 0 || label >= options.num_classes) return LabelKind::kInvalid;
  const std::int64_t row = label - options.class_offset;
  return row >= 0 && row < rows ? LabelKind::kOwn : LabelKind::kForeign;
}

// Sums over the dimensions of a feature u and its class's weight v, each divided by its norm where
// normalized_by says so.
template <class A>
struct Products {
  A plain = 0;       // u . v
  A difference = 0;  // |u - v|^2
  A sum = 0;         // |u + v|^2
};

template <class A>
struct Factors {
  A feature;
  A weight;
};

// Angles are those of normalised rows, whatever the logit is.
template <class A>
FACELT_HOST_DEVICE Factors<A> normalized_by(A inverse_feature_norm, A inverse_weight_norm,
                                            const MarginSoftmaxOptions& options) {
  const bool angles = options.normalize_weight;
  return {options.normalize_features || angles ? inverse_feature_norm : A(1),
          angles ? inverse_weight_norm : A(1)};
}

// A target logit, its derivative by the cosine (as a factor of scale * |x|, if features are not
// normalised), and its derivative along the feature's direction at a fixed angle (of scale).
template <class A>
struct Target {
  A logit;
  A slope;
  A radial;
};

// psi(k theta + m) of section 3, with psi = (-1)^j cos(phi) - 2j falling monotonically, and its
// derivative by cos(theta). Half the difference and half the sum of two unit vectors are sin and
// cos of half the angle: no precision is lost at |cos(theta)| = 1.
template <class A>
struct Psi {
  A value;
  A slope;
};

template <class A>
FACELT_HOST_DEVICE Psi<A> psi(A half_sine, A half_cosine, A margin, std::int64_t multiplier) {
  constexpr double kPi = 3.14159265358979323846;
  const A k = static_cast<A>(multiplier);
  const A theta = 2 * atan2(half_sine, half_cosine);
  const A phi = k * theta + margin;
  const A turns = ceil(phi / static_cast<A>(kPi)) - 1;
  const A j = turns > 0 ? turns : (turns == turns ? A(0) : turns);
  const A sign = fmod(j, A(2)) == A(0) ? A(1) : A(-1);
  const A sine = 2 * half_sine * half_cosine;
  const A cosine = (half_cosine - half_sine) * (half_cosine + half_sine);
  // U_{k-1}(cos(theta)) = sin(k theta) / sin(theta), by its recurrence.
  A ratio = 1, before = 0;
  for (std::int64_t i = 1; i < multiplier; ++i) {
    const A next = 2 * cosine * ratio - before;
    before = ratio;
    ratio = next;
  }
  const A floor = static_cast<A>(1e-4);
  const A across = cos(k * theta) / (sine > floor ? sine : floor);
  return {sign * cos(phi) - 2 * j, sign * k * (cos(margin) * ratio + sin(margin) * across)};
}

template <class A>
FACELT_HOST_DEVICE Target<A> target_logit(const Products<A>& products, A inverse_feature_norm,
                                          A inverse_weight_norm, A cosine_margin, A angular_margin,
                                          const MarginSoftmaxOptions& options) {
  const A scale = static_cast<A>(options.scale);
  if (!options.normalize_weight) return {scale * products.plain, A(1), A(0)};
  const bool zero = inverse_feature_norm == A(0) || inverse_weight_norm == A(0);
  const A half = static_cast<A>(0.70710678118654752440);
  const A half_sine = zero ? half : sqrt(products.difference) / 2;
  const A half_cosine = zero ? half : sqrt(products.sum) / 2;
  const bool bare = options.angular_multiplier == 1 && angular_margin == A(0);
  const Psi<A> angular =
      bare ? Psi<A>{products.plain, A(1)}
           : psi(half_sine, half_cosine, angular_margin, options.angular_multiplier);
  const A reduced = angular.value - cosine_margin;
  if (options.normalize_features) return {scale * reduced, angular.slope, A(0)};
  const A norm = inverse_feature_norm == A(0) ? A(0) : 1 / inverse_feature_norm;
  const A cosine = zero ? A(0) : products.plain;
  return {scale * (norm * reduced), angular.slope, reduced - angular.slope * cosine};
}

// The least power of two that is not below `value`: dividing by it is exact. 1 for 0 and for what
// is not finite.
template <class A>
FACELT_HOST_DEVICE A power_of_two_above(A value) {
  if (!(value > A(0)) || value - value != A(0)) return A(1);
  int exponent;
  const A fraction = frexp(value, &exponent);
  return ldexp(A(1), fraction == A(0.5) ? exponent - 1 : exponent);
}

FACELT_HOST_DEVICE bool takes_part(std::int64_t label, const MarginSoftmaxOptions& options) {
  const LabelKind kind = label_kind(label, 0, options);
  return kind != LabelKind::kIgnored && kind != LabelKind::kInvalid;
}

// How large a sample's numbers in the gradient become: at its target, where an angular margin's
// slope may be steep.
template <class A>
FACELT_HOST_DEVICE A gradient_size(A grad, A slope) {
  const A steepness = fabs(slope);
  return fabs(grad) * (steepness > A(1) ? steepness : A(1));
}

// What float16 has no room for when it adds up all samples of a class: features that are not
// normalised.
template <class A>
FACELT_HOST_DEVICE A crowding(A largest_norm, std::int64_t batch,
                              const MarginSoftmaxOptions& options) {
  const A sum = largest_norm * static_cast<A>(batch) / A(32768);
  return !options.normalize_features && sum > A(1) ? sum : A(1);
}

template <class A>
FACELT_HOST_DEVICE A feature_gain_of(LabelKind kind, A gain) {
  if (kind == LabelKind::kIgnored) return A(0);
  return kind == LabelKind::kInvalid ? static_cast<A>(NAN) : gain;
}

}  // namespace facelt
