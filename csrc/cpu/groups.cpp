#include "groups.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "common.h"

namespace facelt::cpu {

std::int64_t group_labels(const std::int64_t* labels, std::int64_t batch, std::int64_t* order,
                          std::int64_t* segment, std::int64_t* offsets) {
  std::vector<std::pair<std::int64_t, std::int64_t>> keys(batch);
  for (std::int64_t i = 0; i < batch; ++i) keys[i] = {labels[i], i};
  std::sort(keys.begin(), keys.end());
  std::int64_t classes = 0;
  for (std::int64_t p = 0; p < batch; ++p) {
    if (p == 0 || keys[p].first != keys[p - 1].first) offsets[classes++] = p;
    order[p] = keys[p].second;
    segment[keys[p].second] = classes - 1;
  }
  std::fill(offsets + classes, offsets + batch + 1, batch);
  return classes;
}

void group_labels(const TensorView& labels, const TensorView& order, const TensorView& segment,
                  const TensorView& offsets, const TensorView& num_classes, const TensorView&,
                  Execution) {
  const std::int64_t batch = labels.numel();
  const std::int64_t classes = group_labels(
      index_pointer(labels, "labels", batch), batch, index_output(order, "order", batch),
      index_output(segment, "segment", batch), index_output(offsets, "offsets", batch + 1));
  *index_output(num_classes, "num_classes", 1) = classes;
}

std::int64_t group_labels_workspace(std::int64_t) { return 0; }

}  // namespace facelt::cpu
