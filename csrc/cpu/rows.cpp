#include "rows.h"

#include <cstring>

#if defined(__x86_64__)
#define FACELT_X86_VERSIONS 1
#endif

namespace facelt::cpu {

namespace baseline {
constexpr int kVectorBytes = 16;
constexpr int kColumnsAtOnce = 2;
#include "rows.inc"
#include "softmax_rows.inc"
}  // namespace baseline

#if defined(FACELT_X86_VERSIONS)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif
namespace avx2 {
constexpr int kVectorBytes = 32;
constexpr int kColumnsAtOnce = 2;
#include "rows.inc"
#include "softmax_rows.inc"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
#endif
namespace avx512 {
constexpr int kVectorBytes = 64;
constexpr int kColumnsAtOnce = 4;
#include "rows.inc"
#include "softmax_rows.inc"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

template <class A>
const RowKernels<A>& row_kernels() {
  static const RowKernels<A>& chosen = has_avx512() ? avx512::Rows<A>::kTable
                                       : has_avx2() ? avx2::Rows<A>::kTable
                                                    : baseline::Rows<A>::kTable;
  return chosen;
}

template <class A>
const SoftmaxKernels<A>& softmax_kernels() {
  static const SoftmaxKernels<A>& chosen = has_avx512() ? avx512::SoftmaxRows<A>::kTable
                                           : has_avx2() ? avx2::SoftmaxRows<A>::kTable
                                                        : baseline::SoftmaxRows<A>::kTable;
  return chosen;
}

template <class T>
const ConversionKernels<T>& conversion_kernels() {
  static const ConversionKernels<T>& chosen = has_avx512() ? avx512::Conversions<T>::kTable
                                              : has_avx2() ? avx2::Conversions<T>::kTable
                                                           : baseline::Conversions<T>::kTable;
  return chosen;
}

#else

template <class A>
const RowKernels<A>& row_kernels() {
  return baseline::Rows<A>::kTable;
}

template <class A>
const SoftmaxKernels<A>& softmax_kernels() {
  return baseline::SoftmaxRows<A>::kTable;
}

template <class T>
const ConversionKernels<T>& conversion_kernels() {
  return baseline::Conversions<T>::kTable;
}

#endif

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const SoftmaxKernels<float>& softmax_kernels<float>();
template const SoftmaxKernels<double>& softmax_kernels<double>();
template const ConversionKernels<BFloat16>& conversion_kernels<BFloat16>();
template const ConversionKernels<Float16>& conversion_kernels<Float16>();

}  // namespace facelt::cpu
