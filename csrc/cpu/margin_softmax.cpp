#include "norms.h"

namespace facelt::cpu {

namespace {

template <class T, class W>
void targets_of(const TensorView& features, const TensorView& inverse_feature_norms,
                const TensorView& weight, const TensorView& labels, const TensorView& cosine_margin,
                const TensorView& angular_margin, const MarginSoftmaxOptions& options,
                const TensorView& targets, int num_threads) {
  using A = Compute<T>;
  const std::int64_t batch = features.size(0), dimensions = features.size(1);
  const std::int64_t rows = weight.size(0);
  const T* x = input<T>(features, "features", batch * dimensions);
  const W* w = input<W>(weight, "weight", rows * dimensions);
  const A* inverses = input<A>(inverse_feature_norms, "inverse_feature_norms", batch);
  const A* cosine_margins = input<A>(cosine_margin, "cosine_margin", batch);
  const A* angular_margins = input<A>(angular_margin, "angular_margin", batch);
  const std::int64_t* classes = index_pointer(labels, "labels", batch);
  A* out = output<A>(targets, "targets", 3 * batch);
  for (std::int64_t i = 0; i < batch; ++i) {
    if (label_kind(classes[i], rows, options) == LabelKind::kInvalid) {
      throw std::invalid_argument("labels: expected numbers in [0, " +
                                  std::to_string(options.num_classes) + ") or " +
                                  std::to_string(options.ignore_index) + ", got " +
                                  std::to_string(classes[i]) + " at position " + std::to_string(i));
    }
  }
  parallel(num_threads, [&] {
    RowReader<T> feature_reader(dimensions);
    RowReader<W> weight_reader(dimensions);
#pragma omp for schedule(static) nowait
    for (std::int64_t i = 0; i < batch; ++i) {
      Target<A> target{A(0), A(1), A(0)};
      if (label_kind(classes[i], rows, options) == LabelKind::kOwn) {
        const A* feature = feature_reader.read(x + i * dimensions);
        const A* row = weight_reader.read(w + (classes[i] - options.class_offset) * dimensions);
        const A inverse = inverse_norm(row, dimensions);
        const Factors<A> factors = normalized_by(inverses[i], inverse, options);
        Products<A> products;
        for (std::int64_t d = 0; d < dimensions; ++d) {
          const A u = feature[d] * factors.feature, v = row[d] * factors.weight;
          products.plain += u * v;
          products.difference += (u - v) * (u - v);
          products.sum += (u + v) * (u + v);
        }
        target = target_logit(products, inverses[i], inverse, cosine_margins[i], angular_margins[i],
                              options);
      }
      out[i] = target.logit;
      out[batch + i] = target.slope;
      out[2 * batch + i] = target.radial;
    }
  });
}

// A chunk of products, and which of its columns each sample's class has.
template <class P>
struct Chunk {
  using A = Compute<P>;
  std::int64_t batch, columns, first_class;
  const P* products;
  const A* column_scales;
  const std::int64_t* labels;
  const A* target_logits;
  A scale;

  Chunk(const TensorView& products_view, const TensorView& scales, const TensorView& labels_view,
        const TensorView& targets, std::int64_t first_class, double scale)
      : batch(products_view.size(0)),
        columns(products_view.size(1)),
        first_class(first_class),
        products(input<P>(products_view, "products", batch * columns)),
        column_scales(scales.numel() > 0 ? input<A>(scales, "column_scales", columns) : nullptr),
        labels(index_pointer(labels_view, "labels", batch)),
        target_logits(input<A>(targets, "targets", 3 * batch)),
        scale(static_cast<A>(scale)) {}

  // The column of sample i's class, or -1.
  std::int64_t target_column(std::int64_t i) const {
    const std::int64_t column = labels[i] - first_class;
    return column >= 0 && column < columns ? column : -1;
  }
};

template <class A>
void add_to_normalizer(const A* logits, std::int64_t n, bool start, A* largest, A* sum) {
  const SoftmaxKernels<A>& kernels = softmax_kernels<A>();
  constexpr A kNothing = -std::numeric_limits<A>::infinity();
  if (start) {
    *largest = kNothing;
    *sum = 0;
  }
  const A now = std::max(*largest, kernels.maximum(logits, n));
  const A kept = *largest == now ? *sum : *sum * std::exp(*largest - now);
  *sum = kept + kernels.sum_exp(logits, now == kNothing ? A(0) : now, n);
  *largest = now;
}

}  // namespace

void margin_softmax_targets(const TensorView& features, const TensorView& inverse_feature_norms,
                            const TensorView& weight, const TensorView& labels,
                            const TensorView& cosine_margin, const TensorView& angular_margin,
                            const MarginSoftmaxOptions& options, const TensorView& targets,
                            Execution execution) {
  dispatch_pair(features.dtype, weight.dtype, "features", "weight", [&](auto t, auto w) {
    targets_of<decltype(t), decltype(w)>(features, inverse_feature_norms, weight, labels,
                                         cosine_margin, angular_margin, options, targets,
                                         threads(execution));
  });
}

void margin_softmax_normalizer(const TensorView& products, const TensorView& column_scales,
                               const TensorView& labels, const TensorView& targets,
                               std::int64_t first_class, double scale, bool start,
                               const TensorView& normalizer, Execution execution) {
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    const Chunk<P> chunk(products, column_scales, labels, targets, first_class, scale);
    A* largest = output<A>(normalizer, "normalizer", 2 * chunk.batch);
    parallel(threads(execution), [&] {
      RowReader<P> reader(chunk.columns);
      std::vector<A> logits(chunk.columns);
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < chunk.batch; ++i) {
        softmax_kernels<A>().logits(reader.read(chunk.products + i * chunk.columns),
                                    chunk.column_scales, chunk.scale, logits.data(), chunk.columns);
        const std::int64_t column = chunk.target_column(i);
        if (column >= 0) logits[column] = chunk.target_logits[i];
        add_to_normalizer(logits.data(), chunk.columns, start, largest + i,
                          largest + chunk.batch + i);
      }
    });
  });
}

void margin_softmax_coefficients(const TensorView& grad_losses, const TensorView& labels,
                                 const TensorView& targets, const TensorView& inverse_feature_norms,
                                 const MarginSoftmaxOptions& options,
                                 const TensorView& coefficients, const TensorView& weight_gain,
                                 const TensorView& feature_gain, Execution) {
  const std::int64_t batch = grad_losses.numel();
  const std::int64_t* classes = index_pointer(labels, "labels", batch);
  dispatch_floating(grad_losses.dtype, "grad_losses", [&](auto zero) {
    using A = Compute<decltype(zero)>;
    const A* grads = input<A>(grad_losses, "grad_losses", batch);
    const A* slopes = input<A>(targets, "targets", 3 * batch) + batch;
    const A* inverses = input<A>(inverse_feature_norms, "inverse_feature_norms", batch);
    A* out = output<A>(coefficients, "coefficients", batch);
    A* feature_gains = output<A>(feature_gain, "feature_gain", batch);
    A largest = 0, largest_norm = 0;
    for (std::int64_t i = 0; i < batch; ++i) {
      if (!takes_part(classes[i], options)) continue;
      largest = std::max(largest, gradient_size(grads[i], slopes[i]));
      if (inverses[i] > A(0)) largest_norm = std::max(largest_norm, 1 / inverses[i]);
    }
    const A unit = power_of_two_above(largest * crowding(largest_norm, batch, options));
    const A gain = static_cast<A>(options.scale) * unit;
    *output<A>(weight_gain, "weight_gain", 1) = gain;
    for (std::int64_t i = 0; i < batch; ++i) {
      out[i] = takes_part(classes[i], options) ? grads[i] / unit : A(0);
      feature_gains[i] = feature_gain_of(label_kind(classes[i], 0, options), gain);
    }
  });
}

void margin_softmax_gradient(const TensorView& products, const TensorView& column_scales,
                             const TensorView& labels, const TensorView& targets,
                             const TensorView& lse, const TensorView& coefficients,
                             std::int64_t first_class, double scale, const TensorView& gradient,
                             Execution execution) {
  dispatch_floating(products.dtype, "products", [&](auto zero) {
    using P = decltype(zero);
    using A = Compute<P>;
    const Chunk<P> chunk(products, column_scales, labels, targets, first_class, scale);
    const A* shifts = input<A>(lse, "lse", chunk.batch);
    const A* factors = input<A>(coefficients, "coefficients", chunk.batch);
    const A* slopes = chunk.target_logits + chunk.batch;
    P* out = output<P>(gradient, "gradient", chunk.batch * chunk.columns);
    parallel(threads(execution), [&] {
      RowReader<P> reader(chunk.columns);
      RowWriter<P> writer(chunk.columns);
#pragma omp for schedule(static) nowait
      for (std::int64_t i = 0; i < chunk.batch; ++i) {
        P* target = out + i * chunk.columns;
        A* place = writer.place(target);
        if (factors[i] == A(0)) {
          std::fill_n(place, chunk.columns, A(0));
        } else {
          softmax_kernels<A>().exponentials(reader.read(chunk.products + i * chunk.columns),
                                            chunk.column_scales, chunk.scale, shifts[i], factors[i],
                                            place, chunk.columns);
          const std::int64_t column = chunk.target_column(i);
          if (column >= 0) {
            const A weight = chunk.column_scales ? chunk.column_scales[column] : A(1);
            // A row that is nearly zero has a large scale.
            place[column] = within_range<P>(weight * factors[i] * slopes[i] *
                                            (std::exp(chunk.target_logits[i] - shifts[i]) - A(1)));
          }
        }
        writer.store(target);
      }
    });
  });
}

}  // namespace facelt::cpu
