// Every instruction set's row kernels against plain loops, for lengths around the vectors' sizes.
// Prints the sets that this processor has; a mistake is printed and makes the exit code 1.

#include "../csrc/cpu/rows.cpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using namespace facelt;
using namespace facelt::cpu;

int mistakes = 0;

void expect(bool holds, const char* isa, const char* what, std::int64_t n) {
  if (holds) return;
  std::printf("%s: %s is wrong for n = %ld\n", isa, what, static_cast<long>(n));
  ++mistakes;
}

template <class A>
std::vector<A> numbers(std::int64_t n, int seed) {
  std::vector<A> x(n);
  for (std::int64_t d = 0; d < n; ++d) x[d] = static_cast<A>((d * 37 + seed * 101) % 23 - 11);
  return x;
}

// Small integers: every sum is exact, in any order.
template <class A>
void check_rows(const RowKernels<A>& kernels, const char* isa, std::int64_t n) {
  std::vector<std::vector<A>> a, b;
  const A *rows[kTile], *columns[kTile];
  for (int i = 0; i < kTile; ++i) {
    a.push_back(numbers<A>(n, i));
    b.push_back(numbers<A>(n, 10 + i));
    rows[i] = a[i].data();
    columns[i] = b[i].data();
  }
  A distances[kTile * kTile];
  kernels.squared_distances(rows, columns, n, distances);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) {
      A sum = 0;
      for (std::int64_t d = 0; d < n; ++d) sum += (a[i][d] - b[j][d]) * (a[i][d] - b[j][d]);
      expect(distances[kTile * i + j] == sum, isa, "squared_distances", n);
    }
  }
  kernels.inner_products(rows, columns, n, distances);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; ++j) {
      A sum = 0;
      for (std::int64_t d = 0; d < n; ++d) sum += a[i][d] * b[j][d];
      expect(distances[kTile * i + j] == sum, isa, "inner_products", n);
    }
  }
  std::vector<A> sum = a[1], scaled(n), quotient = a[2], difference = a[3];
  kernels.add(a[0].data(), sum.data(), n);
  kernels.scale(a[0].data(), A(3), scaled.data(), n);
  kernels.divide(quotient.data(), A(4), n);
  kernels.add_scaled_difference(a[0].data(), b[0].data(), A(2), difference.data(), n);
  for (std::int64_t d = 0; d < n; ++d) {
    expect(sum[d] == a[0][d] + a[1][d], isa, "add", n);
    expect(scaled[d] == 3 * a[0][d], isa, "scale", n);
    expect(quotient[d] == a[2][d] / 4, isa, "divide", n);
    expect(difference[d] == a[3][d] + 2 * (a[0][d] - b[0][d]), isa, "add_scaled_difference", n);
  }
  A dot = 0, along = 0;
  for (std::int64_t d = 0; d < n; ++d) dot += a[0][d] * b[0][d];
  expect(kernels.dot(a[0].data(), b[0].data(), n) == dot, isa, "dot", n);
  A distance = 0;
  for (std::int64_t d = 0; d < n; ++d) distance += (a[0][d] - b[0][d]) * (a[0][d] - b[0][d]);
  expect(kernels.squared_distance(a[0].data(), b[0].data(), n) == distance, isa, "squared_distance",
         n);
  // raw - (raw . v) v with v = x / 4, times 2; in place too.
  for (std::int64_t d = 0; d < n; ++d) along += a[0][d] * b[1][d] / 4;
  std::vector<A> projected(n), in_place = a[0];
  kernels.project(a[0].data(), b[1].data(), A(0.25), A(2), projected.data(), n);
  kernels.project(in_place.data(), b[1].data(), A(0.25), A(2), in_place.data(), n);
  for (std::int64_t d = 0; d < n; ++d) {
    expect(projected[d] == 2 * (a[0][d] - along * (b[1][d] / 4)), isa, "project", n);
  }
  expect(in_place == projected, isa, "project in place", n);
  expect(kernels.all_finite(a[0].data(), n), isa, "all_finite", n);
  for (std::int64_t d = 0; d < n; ++d) {
    for (const A bad : {A(INFINITY), A(-INFINITY), A(NAN)}) {
      std::vector<A> x = a[0];
      x[d] = bad;
      expect(!kernels.all_finite(x.data(), n), isa, "all_finite", n);
    }
  }
}

// The distance from `value` to the true number, in units of the last place of A.
template <class A>
double ulps(A value, long double truth) {
  const A nearest = static_cast<A>(truth);
  const A unit = std::nextafter(std::abs(nearest), A(INFINITY)) - std::abs(nearest);
  return static_cast<double>(std::abs(static_cast<long double>(value) - truth) / unit);
}

template <class A>
bool same(A x, A y) {
  return x == y || (x != x && y != y);
}

template <class A>
constexpr A kLeast = std::is_same_v<A, float> ? A(-87.3) : A(-708.3);
template <class A>
constexpr A kMost = std::is_same_v<A, float> ? A(88) : A(709);

// exp of one number, by each way there is to it: a whole vector, and the rest of a row.
template <class A>
A exponential_of(const SoftmaxKernels<A>& kernels, A x, std::int64_t n) {
  const std::vector<A> row(n, x), ones(n, A(1));
  std::vector<A> out(n), scaled(n);
  kernels.exponentials(row.data(), nullptr, A(1), A(0), A(1), out.data(), n);
  kernels.exponentials(row.data(), ones.data(), A(1), A(0), A(1), scaled.data(), n);
  for (std::int64_t j = 0; j < n; ++j) {
    if (!same(out[j], out[0]) || !same(scaled[j], out[0])) return A(-1);
  }
  return out[0];
}

template <class A>
void check_exponential(const SoftmaxKernels<A>& kernels, const char* isa) {
  constexpr int kSteps = 20000;
  double worst = 0;
  for (int i = 0; i <= kSteps; ++i) {
    const A x = kLeast<A> + (kMost<A> - kLeast<A>)*A(i) / kSteps;
    worst = std::max(worst, ulps(exponential_of(kernels, x, 19), std::exp((long double)x)));
  }
  expect(worst <= 2, isa, "exp within its range", std::lround(worst));
  for (const A x : {A(0), A(-0.0), A(1e-30), A(-1e-30), A(1e-4), A(-0.34657359), A(0.34657359)}) {
    expect(ulps(exponential_of(kernels, x, 19), std::exp((long double)x)) <= 2, isa, "exp", 19);
  }
  expect(exponential_of(kernels, A(0), 19) == 1, isa, "exp(0)", 19);
  // Above its range it stays where the range ends, a normal number; below it is 0.
  const A least = exponential_of(kernels, kLeast<A>, 19);
  const A most = exponential_of(kernels, kMost<A>, 19);
  expect(least >= std::numeric_limits<A>::min() && std::isfinite(most), isa, "exp's ends", 19);
  for (const A x : {kLeast<A> * 2, A(-1e30), std::numeric_limits<A>::lowest(), A(-INFINITY)}) {
    expect(exponential_of(kernels, x, 19) == 0, isa, "exp below its range", 19);
  }
  for (const A x : {kMost<A> * 2, A(1e30), std::numeric_limits<A>::max(), A(INFINITY)}) {
    expect(exponential_of(kernels, x, 19) == most, isa, "exp above its range", 19);
  }
  const A nan = exponential_of(kernels, A(NAN), 19);
  expect(nan != nan, isa, "exp(NaN)", 19);
}

template <class A>
void check_softmax_rows(const SoftmaxKernels<A>& kernels, const char* isa, std::int64_t n) {
  const std::vector<A> x = numbers<A>(n, 2), scales = numbers<A>(n, 5);
  // Nothing may be written behind a row's end.
  std::vector<A> plain(n + 1, A(77)), scaled(n + 1, A(77));
  kernels.logits(x.data(), nullptr, A(3), plain.data(), n);
  kernels.logits(x.data(), scales.data(), A(3), scaled.data(), n);
  expect(plain[n] == 77 && scaled[n] == 77, isa, "logits' end", n);
  for (std::int64_t j = 0; j < n; ++j) {
    expect(plain[j] == 3 * x[j] && scaled[j] == 3 * (x[j] * scales[j]), isa, "logits", n);
  }

  for (std::int64_t at = 0; at < n; ++at) {
    std::vector<A> row = x;
    row[at] = 50;
    expect(kernels.maximum(row.data(), n) == 50, isa, "maximum", n);
    row[at] = A(INFINITY);
    expect(kernels.maximum(row.data(), n) == A(INFINITY), isa, "maximum of infinity", n);
    row[at] = A(NAN);
    const A sum = kernels.sum_exp(row.data(), A(2), n);
    expect(sum != sum, isa, "sum_exp of NaN", n);
  }
  const std::vector<A> nothing(n, A(-INFINITY)), low(n, A(-9));
  expect(kernels.maximum(nothing.data(), n) == A(-INFINITY), isa, "maximum of -infinity", n);
  expect(kernels.maximum(low.data(), n) == -9, isa, "maximum of what is negative", n);

  long double sum = 0;
  for (const A value : x) sum += std::exp((long double)(value - 4));
  expect(ulps(kernels.sum_exp(x.data(), A(4), n), sum) <= 4, isa, "sum_exp", n);

  std::vector<A> flat(n + 1, A(77)), own = x;
  own.push_back(77);
  kernels.exponentials(x.data(), nullptr, A(0.5), A(3), A(-0.75), flat.data(), n);
  std::vector<A> by_column(n + 1, A(77));
  kernels.exponentials(x.data(), scales.data(), A(0.125), A(3), A(-0.75), by_column.data(), n);
  kernels.exponentials(own.data(), scales.data(), A(0.125), A(3), A(-0.75), own.data(), n);
  expect(own == by_column, isa, "exponentials in place", n);
  expect(flat[n] == 77 && by_column[n] == 77, isa, "exponentials' end", n);
  for (std::int64_t j = 0; j < n; ++j) {
    const long double weight = -0.75L * scales[j];
    expect(ulps(flat[j], -0.75L * std::exp(0.5L * x[j] - 3)) <= 3, isa, "exponentials", n);
    expect(ulps(by_column[j], weight * std::exp(0.125L * (x[j] * scales[j]) - 3)) <= 3, isa,
           "exponentials by column", n);
  }
}

// What is above the threshold, and NaN, in order: at every place, and at several.
template <class A>
void check_keep_above(const SoftmaxKernels<A>& kernels, const char* isa, std::int64_t n) {
  const auto check = [&](const std::vector<A>& x, A threshold) {
    std::vector<A> wanted, kept(n + 1, A(77));
    for (const A value : x) {
      if (!(value <= threshold)) wanted.push_back(value);
    }
    const std::int64_t count = kernels.keep_above(x.data(), threshold, kept.data(), n);
    bool equal = count == static_cast<std::int64_t>(wanted.size());
    for (std::size_t i = 0; equal && i < wanted.size(); ++i) equal = same(kept[i], wanted[i]);
    expect(equal && kept[n] == 77, isa, "keep_above", n);
  };
  const std::vector<A> x = numbers<A>(n, 4);
  for (const A threshold : {A(-12), A(-11), A(0), A(10), A(11), A(-INFINITY), A(INFINITY)}) {
    check(x, threshold);
  }
  for (std::int64_t at = 0; at < n; ++at) {
    for (const A value : {A(12), A(NAN), A(INFINITY)}) {
      std::vector<A> row = x;
      row[at] = value;
      check(row, A(11));
      row[n - 1 - at] = value;
      check(row, A(11));
    }
  }
}

// Factors lie by rows and by columns; nothing beside `width` may be written.
template <class A>
void check_product(const RowKernels<A>& kernels, const char* isa, std::int64_t n) {
  constexpr std::int64_t kCount = 5;
  const std::int64_t stride = n + 1;
  for (std::int64_t outputs : {1, 2, 4, 7, 16, 19}) {
    const std::vector<A> factors = numbers<A>(outputs * kCount, 6);
    const std::vector<A> rows = numbers<A>(kCount * stride, 7);
    const std::vector<A> base = numbers<A>(outputs * n, 8);
    std::vector<const A*> bases;
    for (std::int64_t i = 0; i < outputs; ++i) bases.push_back(base.data() + i * n);
    for (const bool by_rows : {true, false}) {
      for (const bool with_bases : {true, false}) {
        const std::int64_t along = by_rows ? kCount : 1, across = by_rows ? 1 : outputs;
        std::vector<A> out(outputs * stride, A(77)), wanted = out;
        for (std::int64_t i = 0; i < outputs; ++i) {
          for (std::int64_t d = 0; d < n; ++d) {
            A& sum = wanted[i * stride + d];
            sum = with_bases ? base[i * n + d] : A(0);
            for (std::int64_t r = 0; r < kCount; ++r) {
              sum += factors[i * along + r * across] * rows[r * stride + d];
            }
          }
        }
        kernels.product({factors.data(), along, across, rows.data(), stride,
                         with_bases ? bases.data() : nullptr, out.data(), stride, outputs, kCount,
                         n});
        expect(out == wanted, isa, "product", n);
      }
    }
  }
}

// Of one hinge, plainly: its loss, and its gradient by `own` and by the terms.
template <class A>
long double plain_hinge(const std::vector<A>& terms, A own, A margin, long double* by_own,
                        std::vector<long double>* by_terms) {
  long double sum = 0;
  for (const A term : terms) sum += std::exp((long double)term);
  const long double loss = margin - own + std::log(sum);
  by_terms->assign(terms.size(), 0);
  if (terms.empty() || loss <= 0) return 0;
  *by_own -= 1;
  for (std::size_t j = 0; j < terms.size(); ++j) {
    (*by_terms)[j] = std::exp((long double)terms[j]) / sum;
  }
  return loss;
}

// Sample i is in cluster i % clusters; cluster 2 has no samples, and so cluster 0 has its.
template <class A>
void check_hinges(const SoftmaxKernels<A>& kernels, const char* isa, std::int64_t clusters) {
  std::vector<A> classes(clusters), own(kHingeSamples), own_class(kHingeSamples);
  for (std::int64_t m = 0; m < clusters; ++m) classes[m] = m == 2 ? A(-1) : A(m % 3);
  for (int i = 0; i < kHingeSamples; ++i) {
    own[i] = i % clusters == 2 ? A(0) : A(i % clusters);
    own_class[i] = classes[static_cast<int>(own[i])];
  }
  std::vector<A> terms = numbers<A>(clusters * kHingeSamples, 9);
  for (A& term : terms) term /= 8;
  const std::vector<A> similarities = terms, factors = numbers<A>(kHingeSamples, 11);
  std::vector<A> losses(kHingeSamples);
  kernels.hinges({classes.data(), clusters, A(0.5), A(-0.25), own.data(), own_class.data(),
                  factors.data(), terms.data(), losses.data()});
  for (int i = 0; i < kHingeSamples; ++i) {
    std::vector<A> between, within;
    std::vector<long double> by_between, by_within;
    const auto similarity = [&](std::int64_t m) { return similarities[m * kHingeSamples + i]; };
    for (std::int64_t m = 0; m < clusters; ++m) {
      if (classes[m] < 0 || A(m) == own[i]) continue;
      (classes[m] == own_class[i] ? within : between).push_back(similarity(m));
    }
    const A self = similarity(static_cast<std::int64_t>(own[i]));
    long double by_own = 0;
    const long double loss = plain_hinge(between, self, A(0.5), &by_own, &by_between) +
                             plain_hinge(within, self, A(-0.25), &by_own, &by_within);
    expect(std::abs(losses[i] - loss) < 1e-5, isa, "hinges' losses", clusters);
    std::size_t b = 0, w = 0;
    for (std::int64_t m = 0; m < clusters; ++m) {
      long double wanted = 0;
      if (A(m) == own[i]) {
        wanted = by_own;
      } else if (classes[m] >= 0) {
        wanted = classes[m] == own_class[i] ? by_within[w++] : by_between[b++];
      }
      const long double got = terms[m * kHingeSamples + i];
      expect(std::abs(got - factors[i] * wanted) < 1e-5, isa, "hinges' gradient", clusters);
    }
  }
}

template <class T>
void check_conversions(const ConversionKernels<T>& kernels, const char* isa, std::int64_t n) {
  const std::vector<float> x = numbers<float>(n, 3);
  std::vector<T> stored(n);
  std::vector<float> back(n);
  kernels.narrow(x.data(), stored.data(), n);
  kernels.widen(stored.data(), back.data(), n);
  expect(back == x, isa, "narrow or widen", n);
}

template <template <class> class Rows, template <class> class SoftmaxRows,
          template <class> class Conversions>
void check(const char* isa) {
  std::printf("%s\n", isa);
  check_exponential(SoftmaxRows<float>::kTable, isa);
  check_exponential(SoftmaxRows<double>::kTable, isa);
  for (std::int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 513}) {
    check_rows(Rows<float>::kTable, isa, n);
    check_rows(Rows<double>::kTable, isa, n);
    check_softmax_rows(SoftmaxRows<float>::kTable, isa, n);
    check_softmax_rows(SoftmaxRows<double>::kTable, isa, n);
    check_keep_above(SoftmaxRows<float>::kTable, isa, n);
    check_keep_above(SoftmaxRows<double>::kTable, isa, n);
    check_product(Rows<float>::kTable, isa, n);
    check_product(Rows<double>::kTable, isa, n);
    check_hinges(SoftmaxRows<float>::kTable, isa, n);
    check_hinges(SoftmaxRows<double>::kTable, isa, n);
    check_conversions(Conversions<BFloat16>::kTable, isa, n);
    check_conversions(Conversions<Float16>::kTable, isa, n);
  }
}

}  // namespace

int main() {
  check<baseline::Rows, baseline::SoftmaxRows, baseline::Conversions>("baseline");
#if defined(FACELT_X86_VERSIONS)
  if (has_avx2()) check<avx2::Rows, avx2::SoftmaxRows, avx2::Conversions>("avx2");
  if (has_avx512()) check<avx512::Rows, avx512::SoftmaxRows, avx512::Conversions>("avx512");
#endif
  return mistakes ? 1 : 0;
}
