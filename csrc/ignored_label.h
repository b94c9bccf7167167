// Which samples take no part in a batch loss; the same on host and device.
#pragma once

#include <optional>

#include "scalar.h"

namespace facelt {

struct IgnoredLabel {
  bool given = false;
  std::int64_t label = 0;

  IgnoredLabel() = default;
  explicit IgnoredLabel(const std::optional<std::int64_t>& ignored)
      : given(ignored.has_value()), label(ignored.value_or(0)) {}

  FACELT_HOST_DEVICE bool marks(std::int64_t other) const { return given && other == label; }
};

}  // namespace facelt
