// What a sample of the dispersion softmax is, the same on host and device.
#pragma once

#include "scalar.h"

namespace facelt {

constexpr std::int64_t kIgnoredClass = -1, kInvalidClass = -2;

// Among heads and super classes.
FACELT_HOST_DEVICE std::int64_t coarse_class(std::int64_t label, std::int64_t heads,
                                             std::int64_t tails, const std::int64_t* super_class,
                                             std::int64_t ignore_index) {
  if (label == ignore_index) return kIgnoredClass;
  if (label < 0 || label >= heads + tails) return kInvalidClass;
  return label < heads ? label : heads + super_class[label - heads];
}

}  // namespace facelt
