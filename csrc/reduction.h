// How the losses of samples become one; the same in every backend.
#pragma once

#include <cstdint>

namespace facelt {

enum class Reduction : int { kNone, kSum, kMean };

// The number of losses that come out, and of gradients that go in.
inline std::int64_t number_of_losses(Reduction reduction, std::int64_t batch) {
  return reduction == Reduction::kNone ? batch : 1;
}

}  // namespace facelt
