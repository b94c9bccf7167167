#pragma once

#include "../ignored_label.h"

namespace facelt::cpu {

// The classes of a batch: order and offsets and segment as launchers.inc says.
// Returns the number of classes.
std::int64_t group_labels(const std::int64_t* labels, std::int64_t batch, IgnoredLabel ignored,
                          std::int64_t* order, std::int64_t* segment, std::int64_t* offsets);

}  // namespace facelt::cpu
