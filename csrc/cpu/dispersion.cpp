#include "../dispersion.h"

#include "norms.h"
#include "streaming.h"

namespace facelt::cpu {

namespace {

// A batch against the members of its super classes.
template <class W>
struct Tails {
  using A = Compute<W>;
  std::int64_t batch, dimensions, heads, rows;
  const A* features;
  const W* weight;
  const std::int64_t* labels;
  const std::int64_t* order;
  const std::int64_t* offsets;

  Tails(const TensorView& features_view, const TensorView& tail_weight,
        const TensorView& labels_view, const TensorView& order_view, const TensorView& offsets_view,
        std::int64_t num_head)
      : batch(features_view.size(0)),
        dimensions(features_view.size(1)),
        heads(num_head),
        rows(tail_weight.size(0)),
        features(input<A>(features_view, "features", batch * dimensions)),
        weight(input<W>(tail_weight, "tail_weight", rows * dimensions)),
        labels(index_pointer(labels_view, "labels", batch)),
        order(index_pointer(order_view, "order", rows)),
        offsets(index_pointer(offsets_view, "offsets", offsets_view.numel())) {}

  const A* feature(std::int64_t i) const { return features + i * dimensions; }
  const W* row(std::int64_t tail) const { return weight + tail * dimensions; }
  A dot(const A* x, const A* y) const { return row_kernels<A>().dot(x, y, dimensions); }

  // The probability of member `tail` for sample i, less 1 if it is the sample's own class.
  A residual(std::int64_t i, std::int64_t tail, const A* member, A lse) const {
    const A probability = std::exp(dot(feature(i), member) - lse);
    return labels[i] == heads + tail ? probability - A(1) : probability;
  }
};

// log of a sum of exponentials that come one by one.
template <class A>
class RunningLogSum {
 public:
  void add(A logit) {
    if (logit > largest_) {
      sum_ = sum_ * std::exp(largest_ - logit) + A(1);
      largest_ = logit;
    } else {
      sum_ += logit == largest_ ? A(1) : std::exp(logit - largest_);
    }
  }

  A value() const { return largest_ + std::log(sum_); }

 private:
  A largest_ = -std::numeric_limits<A>::infinity();
  A sum_ = 0;
};

template <class W>
void write_targets(const Tails<W>& tails, const TensorView& head_weight,
                   const TensorView& super_class, std::int64_t ignore_index,
                   const TensorView& classes, const TensorView& targets, int num_threads) {
  using A = Compute<W>;
  const std::int64_t batch = tails.batch, heads = tails.heads;
  const W* head = input<W>(head_weight, "head_weight", heads * tails.dimensions);
  const std::int64_t* index = index_pointer(super_class, "super_class", tails.rows);
  std::int64_t* coarse = index_output(classes, "classes", batch);
  A* out = output<A>(targets, "targets", 3 * batch);
  for (std::int64_t i = 0; i < batch; ++i) {
    coarse[i] = coarse_class(tails.labels[i], heads, tails.rows, index, ignore_index);
    if (coarse[i] != kInvalidClass) continue;
    throw std::invalid_argument(
        "labels: expected numbers in [0, " + std::to_string(heads + tails.rows) + ") or " +
        std::to_string(ignore_index) + ", got " + std::to_string(tails.labels[i]) +
        " at position " + std::to_string(i));
  }
  parallel(num_threads, [&] {
    RowReader<W> reader(tails.dimensions);
#pragma omp for schedule(dynamic, 8) nowait
    for (std::int64_t i = 0; i < batch; ++i) {
      A logit = 0, own = 0;
      if (coarse[i] >= 0 && coarse[i] < heads) {
        own = tails.dot(tails.feature(i), reader.read(head + coarse[i] * tails.dimensions));
        logit = own;
      } else if (coarse[i] >= heads) {
        RunningLogSum<A> sum;
        const std::int64_t s = coarse[i] - heads;
        for (std::int64_t p = tails.offsets[s]; p < tails.offsets[s + 1]; ++p) {
          const std::int64_t tail = tails.order[p];
          const A member = tails.dot(tails.feature(i), reader.read(tails.row(tail)));
          if (tails.labels[i] == heads + tail) own = member;
          sum.add(member);
        }
        logit = sum.value();
      }
      out[i] = logit;
      out[batch + i] = coarse[i] < heads ? A(1) : A(0);
      out[2 * batch + i] = own;
    }
  });
}

}  // namespace

void dispersion_targets(const TensorView& features, const TensorView& head_weight,
                        const TensorView& tail_weight, const TensorView& labels,
                        const TensorView& super_class, const TensorView& order,
                        const TensorView& offsets, std::int64_t ignore_index,
                        const TensorView& classes, const TensorView& targets, Execution execution) {
  dispatch_floating(tail_weight.dtype, "tail_weight", [&](auto zero) {
    const Tails<decltype(zero)> tails(features, tail_weight, labels, order, offsets,
                                      head_weight.size(0));
    write_targets(tails, head_weight, super_class, ignore_index, classes, targets,
                  threads(execution));
  });
}

void dispersion_feature_gradient(const TensorView& features, const TensorView& tail_weight,
                                 const TensorView& labels, const TensorView& classes,
                                 const TensorView& order, const TensorView& offsets,
                                 const TensorView& lse, const TensorView& coefficients,
                                 std::int64_t num_head, const TensorView& raw_features,
                                 Execution execution) {
  dispatch_floating(tail_weight.dtype, "tail_weight", [&](auto zero) {
    using W = decltype(zero);
    using A = Compute<W>;
    const Tails<W> tails(features, tail_weight, labels, order, offsets, num_head);
    const std::int64_t* coarse = index_pointer(classes, "classes", tails.batch);
    const A* shifts = input<A>(lse, "lse", tails.batch);
    const A* factors = input<A>(coefficients, "coefficients", tails.batch);
    A* out = output<A>(raw_features, "raw_features", tails.batch * tails.dimensions);
    parallel(threads(execution), [&] {
      RowReader<W> reader(tails.dimensions);
#pragma omp for schedule(dynamic, 8) nowait
      for (std::int64_t i = 0; i < tails.batch; ++i) {
        if (coarse[i] < num_head || factors[i] == A(0)) continue;
        const std::int64_t s = coarse[i] - num_head;
        for (std::int64_t p = tails.offsets[s]; p < tails.offsets[s + 1]; ++p) {
          const A* member = reader.read(tails.row(tails.order[p]));
          const A factor = factors[i] * tails.residual(i, tails.order[p], member, shifts[i]);
          row_kernels<A>().add_scaled(member, factor, out + i * tails.dimensions, tails.dimensions);
        }
      }
    });
  });
}

void dispersion_tail_gradient(const TensorView& raw, const TensorView& gain,
                              const TensorView& features, const TensorView& tail_weight,
                              const TensorView& labels, const TensorView& order,
                              const TensorView& offsets, const TensorView& sample_order,
                              const TensorView& sample_offsets, const TensorView& lse,
                              const TensorView& coefficients, std::int64_t num_head,
                              std::int64_t first, const TensorView& grad_tail,
                              Execution execution) {
  check_super_classes(first, raw.size(0), offsets.numel() - 1);
  dispatch_pair(raw.dtype, tail_weight.dtype, "raw", "tail_weight", [&](auto p, auto w) {
    using P = decltype(p);
    using W = decltype(w);
    using A = Compute<W>;
    const Tails<W> tails(features, tail_weight, labels, order, offsets, num_head);
    const std::int64_t count = raw.size(0), dimensions = tails.dimensions;
    const P* sums = input<P>(raw, "raw", count * dimensions);
    const A factor = *input<A>(gain, "gain", 1);
    const std::int64_t* samples = index_pointer(sample_order, "sample_order", tails.batch);
    const std::int64_t* starts = index_pointer(sample_offsets, "sample_offsets", offsets.numel());
    const A* shifts = input<A>(lse, "lse", tails.batch);
    const A* factors = input<A>(coefficients, "coefficients", tails.batch);
    const TableWriter<W> table(output<W>(grad_tail, "grad_tail", tails.rows * dimensions),
                               tails.rows, dimensions);
    parallel(threads(execution), [&] {
      RowReader<P> raw_reader(dimensions);
      RowReader<W> reader(dimensions);
      std::vector<A> share(dimensions), sum(dimensions);
      std::vector<W> row(dimensions);
#pragma omp for schedule(dynamic, 16) nowait
      for (std::int64_t c = 0; c < count; ++c) {
        const std::int64_t s = first + c;
        const std::int64_t members = tails.offsets[s + 1] - tails.offsets[s];
        row_kernels<A>().scale(raw_reader.read(sums + c * dimensions), factor, share.data(),
                               dimensions);
        row_kernels<A>().divide(share.data(), static_cast<A>(members), dimensions);
        narrow_row(share.data(), row.data(), dimensions);
        for (std::int64_t q = tails.offsets[s]; q < tails.offsets[s + 1]; ++q) {
          const std::int64_t tail = tails.order[q];
          if (starts[s] < starts[s + 1]) {
            sum = share;
            const A* member = reader.read(tails.row(tail));
            for (std::int64_t b = starts[s]; b < starts[s + 1]; ++b) {
              const std::int64_t i = samples[b];
              if (factors[i] == A(0)) continue;
              const A residual = tails.residual(i, tail, member, shifts[i]);
              row_kernels<A>().add_scaled(tails.feature(i), factor * factors[i] * residual,
                                          sum.data(), dimensions);
            }
            narrow_row(sum.data(), row.data(), dimensions);
          }
          table.write(tail, row.data());
        }
      }
      table.finish();
    });
  });
}

}  // namespace facelt::cpu
