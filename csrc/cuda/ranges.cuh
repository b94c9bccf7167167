#pragma once

#include "distance_tile.cuh"
#include "groups.cuh"

namespace facelt::FACELT_CUDA_NAMESPACE {

// Each tile's k largest pairs of each class it meets. A tile on the diagonal may meet many classes:
// theirs stand at the sorted position of the class's first row in the tile, [B, k]. A tile off the
// diagonal meets at most one, since the batch is sorted: [tiles, tiles, k].
template <class A>
struct TileCandidates {
  Candidate<A>* diagonal;
  Candidate<A>* cross;
  std::int64_t tiles;

  TileCandidates(Arena& arena, std::int64_t batch, std::int64_t k)
      : diagonal(arena.take<Candidate<A>>(batch * k)),
        cross(arena.take<Candidate<A>>(number_of_tiles(batch) * number_of_tiles(batch) * k)),
        tiles(number_of_tiles(batch)) {}
};

template <class T>
struct RangeTiles {
  const T* features;
  const std::int64_t* labels;
  const std::int64_t* order;
  const std::int64_t* taking_part;  // [1] so many samples of `order`
  std::int64_t batch, dimensions, k;
  TileCandidates<Compute<T>> candidates;
};

// One block more does the numbering where it is given.
template <class T>
void launch_range_tiles(const RangeTiles<T>& tiles, const Numbering* numbering, stream_t stream);

// A lane's way over the k candidates of each pair of `span` tiles, row by row from the diagonal on,
// kWarp candidates at a time. Divisions are slow, so it makes them once.
struct CandidateWalk {
  std::int64_t span, k, row = 0, column, item, columns_on, items_on;

  __device__ CandidateWalk(std::int64_t span, std::int64_t k, int lane)
      : span(span),
        k(k),
        column(lane / k),
        item(lane % k),
        columns_on(kWarp / k),
        items_on(kWarp % k) {
    wrap();
  }

  __device__ void advance() {
    column += columns_on;
    item += items_on;
    if (item >= k) {
      item -= k;
      ++column;
    }
    wrap();
  }

 private:
  __device__ void wrap() {
    for (; row < span && column >= span; ++row) column += row + 1 - span;
  }
};

// Merges the candidates of the class at sorted positions [begin, end); a warp's work. Lane 0 writes
// its ranges and pairs of samples, filled up to k with 0 and kNoPair. Returns their number.
template <class A>
__device__ std::int64_t merge_class(const TileCandidates<A>& candidates, std::int64_t begin,
                                    std::int64_t end, const std::int64_t* order, std::int64_t batch,
                                    std::int64_t k, bool squared, A* ranges, std::int64_t* pairs) {
  const int lane = threadIdx.x % kWarp;
  const std::int64_t first_tile = begin / kTile;
  const std::int64_t span = end - begin < 2 ? 0 : (end - 1) / kTile - first_tile + 1;
  const CandidateWalk start(span, k, lane);
  Candidate<A> previous{A(0), kNoPair};
  std::int64_t number = 0;
  for (std::int64_t j = 0; j < k; ++j) {
    Candidate<A> best{A(0), kNoPair};
    for (CandidateWalk at = start; at.row < span; at.advance()) {
      const std::int64_t row = at.row, column = at.column;
      const std::int64_t head = (first_tile + row) * kTile;
      const Candidate<A> candidate =
          row == column
              ? candidates.diagonal[(head < begin ? begin : head) * k + at.item]
              : candidates.cross[((first_tile + row) * candidates.tiles + first_tile + column) * k +
                                 at.item];
      const bool taken = number > 0 && !is_larger(previous, candidate);
      if (!taken && is_larger(candidate, best)) best = candidate;
    }
    best = warp_first(best, is_larger<A>);
    const bool found = best.pair != kNoPair;
    if (lane == 0) {
      ranges[j] = !found ? A(0) : squared ? best.distance : square_root(best.distance);
      pairs[2 * j] = found ? order[best.pair / batch] : kNoPair;
      pairs[2 * j + 1] = found ? order[best.pair % batch] : kNoPair;
    }
    number += found;
    previous = best;
    if (!found) {
      for (std::int64_t rest = j + 1 + lane; rest < k; rest += kWarp) {
        ranges[rest] = A(0);
        pairs[2 * rest] = pairs[2 * rest + 1] = kNoPair;
      }
      break;
    }
  }
  return number;
}

// What the inter term adds to the pairs' gradients; `gradient` null for none.
template <class A>
struct CenterGradient {
  const A* grad_loss;
  const std::int64_t* offsets;
  const std::int64_t* pair;
  const A* gradient;
  const A* poison;  // added to every element: 0 or NaN
};

// grad_i = center's share + sum over the pairs (i, o) of i's class of pair_scale * (x_i - x_o), all
// times *grad_loss where a center is given. 0 for a segment of -1, NaN for one beyond `rows`.
template <class T>
struct PairGradients {
  const T* features;
  const std::int64_t* segment;
  const std::int64_t* pairs;
  const Compute<T>* pair_scale;
  std::int64_t batch, dimensions, rows, k;
  T* grad_features;
  CenterGradient<Compute<T>> center;
};

template <class T>
void launch_pair_gradients(const PairGradients<T>& gradients, stream_t stream);

}  // namespace facelt::FACELT_CUDA_NAMESPACE
