#include "groups.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common.h"

namespace facelt::cpu {

namespace {

// Stable: equal labels stay in batch order. Labels and positions that fit one word together, which
// is the rule, sort twice as fast as pairs do.
void sort_by_label(const std::int64_t* labels, std::int64_t batch, std::int64_t* order) {
  using Word = std::uint64_t;
  if (batch == 0) return;
  const auto [least, largest] = std::minmax_element(labels, labels + batch);
  const Word count = static_cast<Word>(batch), origin = static_cast<Word>(*least);
  int bits = 1;
  while (count >> bits) ++bits;
  const Word position = (Word{1} << bits) - 1;
  if ((static_cast<Word>(*largest) - origin) <= ~Word{0} >> bits) {
    std::vector<Word> keys(batch);
    for (Word i = 0; i < count; ++i) keys[i] = (static_cast<Word>(labels[i]) - origin) << bits | i;
    std::sort(keys.begin(), keys.end());
    for (Word p = 0; p < count; ++p) order[p] = static_cast<std::int64_t>(keys[p] & position);
  } else {
    std::iota(order, order + batch, std::int64_t{0});
    std::stable_sort(order, order + batch,
                     [&](std::int64_t i, std::int64_t j) { return labels[i] < labels[j]; });
  }
}

}  // namespace

std::int64_t group_labels(const std::int64_t* labels, std::int64_t batch, std::int64_t* order,
                          std::int64_t* segment, std::int64_t* offsets) {
  sort_by_label(labels, batch, order);
  std::int64_t classes = 0;
  for (std::int64_t p = 0; p < batch; ++p) {
    if (p == 0 || labels[order[p]] != labels[order[p - 1]]) offsets[classes++] = p;
    segment[order[p]] = classes - 1;
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
