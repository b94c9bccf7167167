// Every instruction set's row kernels against plain loops, for lengths around the vectors' sizes.
// Prints the sets that this processor has; a mistake is printed and makes the exit code 1.

#include "../csrc/cpu/rows.cpp"

#include <cmath>
#include <cstdio>
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
  expect(kernels.all_finite(a[0].data(), n), isa, "all_finite", n);
  for (std::int64_t d = 0; d < n; ++d) {
    for (const A bad : {A(INFINITY), A(-INFINITY), A(NAN)}) {
      std::vector<A> x = a[0];
      x[d] = bad;
      expect(!kernels.all_finite(x.data(), n), isa, "all_finite", n);
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

template <template <class> class Rows, template <class> class Conversions>
void check(const char* isa) {
  std::printf("%s\n", isa);
  for (std::int64_t n : {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 513}) {
    check_rows(Rows<float>::kTable, isa, n);
    check_rows(Rows<double>::kTable, isa, n);
    check_conversions(Conversions<BFloat16>::kTable, isa, n);
    check_conversions(Conversions<Float16>::kTable, isa, n);
  }
}

}  // namespace

int main() {
  check<baseline::Rows, baseline::Conversions>("baseline");
#if defined(FACELT_X86_VERSIONS)
  if (has_avx2()) check<avx2::Rows, avx2::Conversions>("avx2");
  if (has_avx512()) check<avx512::Rows, avx512::Conversions>("avx512");
#endif
  return mistakes ? 1 : 0;
}
