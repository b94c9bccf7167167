// What a sample of the dispersion softmax is, the same on host and device.
#pragma once

#include <stdexcept>
#include <string>

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

// Of a chunk of `chunk` super classes from `first` on, out of `count`.
inline void check_super_classes(std::int64_t first, std::int64_t chunk, std::int64_t count) {
  if (first >= 0 && first + chunk <= count) return;
  throw std::invalid_argument("raw: expected at most " + std::to_string(count - first) +
                              " rows, one for each super class from " + std::to_string(first) +
                              " on, got " + std::to_string(chunk));
}

}  // namespace facelt
