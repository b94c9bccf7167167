#include "groups.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

namespace {

// A stable sort by counting: one warp counts, for its sample, the labels that come before.
__global__ void rank_labels_kernel(const std::int64_t* labels, std::int64_t batch,
                                   std::int64_t* order, std::int64_t* starts, unsigned* ticket) {
  if (ticket != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *ticket = 0;
  const std::int64_t i =
      static_cast<std::int64_t>(blockIdx.x) * (kGroupThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= batch) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t label = labels[i];
  long long smaller = 0, equal_before = 0;
  for (std::int64_t j = lane; j < batch; j += kWarp) {
    smaller += labels[j] < label;
    equal_before += labels[j] == label && j < i;
  }
  smaller = warp_sum(smaller);
  equal_before = warp_sum(equal_before);
  if (lane == 0) {
    order[smaller + equal_before] = i;
    starts[smaller + equal_before] = smaller;
  }
}

__global__ void number_segments_kernel(Numbering numbering) { number_segments(numbering); }

}  // namespace

void launch_rank_labels(const std::int64_t* labels, std::int64_t batch, std::int64_t* order,
                        std::int64_t* starts, unsigned* ticket, stream_t stream) {
  launch(rank_labels_kernel, blocks_for(batch, kGroupThreads / kWarp), kGroupThreads, 0, stream,
         labels, batch, order, starts, ticket);
}

void group_labels(const TensorView& labels, const TensorView& order, const TensorView& segment,
                  const TensorView& offsets, const TensorView& num_classes,
                  const TensorView& workspace, Execution execution) {
  const std::int64_t batch = labels.numel();
  const int device = labels.device;
  constexpr ScalarType kIndex = ScalarType::kInt64;
  Arena arena(workspace_pointer(workspace, group_labels_workspace(batch), device));
  std::int64_t* starts = arena.take<std::int64_t>(batch);
  const Numbering numbering{pointer<std::int64_t>(order, "order", kIndex, batch, device),
                            starts,
                            batch,
                            pointer<std::int64_t>(segment, "segment", kIndex, batch, device),
                            pointer<std::int64_t>(offsets, "offsets", kIndex, batch + 1, device),
                            pointer<std::int64_t>(num_classes, "num_classes", kIndex, 1, device)};
  launch_rank_labels(pointer<const std::int64_t>(labels, "labels", kIndex, batch, device), batch,
                     pointer<std::int64_t>(order, "order", kIndex, batch, device), starts, nullptr,
                     stream_of(execution));
  launch(number_segments_kernel, 1, kGroupThreads, 0, stream_of(execution), numbering);
}

std::int64_t group_labels_workspace(std::int64_t batch) {
  Arena arena;
  arena.take<std::int64_t>(batch);
  return arena.used();
}

}  // namespace facelt::FACELT_CUDA_NAMESPACE
