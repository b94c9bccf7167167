// What the selection of the k largest products keeps of each row.
#pragma once

#include <cstdint>

namespace facelt {

// Room for the k largest, and for so many more that they are seldom sorted out. `step` columns are
// looked at between two checks of whether there is room for them.
constexpr std::int64_t selection_capacity(std::int64_t k, std::int64_t step) {
  return k + (k > 4 * step ? k : 4 * step);
}

}  // namespace facelt
