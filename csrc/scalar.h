// The scalar types of the kernels, one header for host, device and emulator: half types are storage
// only, and arithmetic on them is float.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "tensor_view.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FACELT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FACELT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace facelt {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

namespace detail {

FACELT_HOST_DEVICE float float_of_bits(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FACELT_HOST_DEVICE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace detail

// Template arguments in the kernels: T is how a number is stored, Compute<T> how it is reckoned
// with.
template <class T>
struct Scalar;

template <>
struct Scalar<double> {
  using Compute = double;
  static constexpr ScalarType kType = ScalarType::kFloat64;
};
template <>
struct Scalar<float> {
  using Compute = float;
  static constexpr ScalarType kType = ScalarType::kFloat32;
};
template <>
struct Scalar<BFloat16> {
  using Compute = float;
  static constexpr ScalarType kType = ScalarType::kBFloat16;
};
template <>
struct Scalar<Float16> {
  using Compute = float;
  static constexpr ScalarType kType = ScalarType::kFloat16;
};

template <class T>
using Compute = typename Scalar<T>::Compute;

FACELT_HOST_DEVICE float widen(float value) { return value; }
FACELT_HOST_DEVICE double widen(double value) { return value; }
FACELT_HOST_DEVICE float widen(BFloat16 value) {
  return detail::float_of_bits(static_cast<std::uint32_t>(value.bits) << 16);
}
FACELT_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Shifted into float's place the exponent is off by 112; the multiplication mends that and, being
  // exact, the subnormals too. Infinity and NaN need their exponent filled up.
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = detail::float_of_bits(magnitude) * 5.192296858534828e33f;  // 2^112
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return detail::float_of_bits(sign | detail::bits_of_float(scaled) | special);
#endif
}

template <class T>
FACELT_HOST_DEVICE T narrow(Compute<T> value);

template <>
FACELT_HOST_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
FACELT_HOST_DEVICE double narrow<double>(double value) {
  return value;
}
template <>
FACELT_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = detail::bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  return BFloat16{static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
template <>
FACELT_HOST_DEVICE Float16 narrow<Float16>(float value) {
#if defined(__CUDA_ARCH__)
  return Float16{__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = detail::bits_of_float(value);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return Float16{static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return Float16{static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Adding 0.5 puts a subnormal half's last bit where float addition rounds to even.
    const float aligned = detail::float_of_bits(magnitude) + 0.5f;
    return Float16{
        static_cast<std::uint16_t>(sign | (detail::bits_of_float(aligned) - 0x3f000000u))};
  }
  const std::uint32_t rebased = magnitude - 0x38000000u;
  return Float16{
      static_cast<std::uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13))};
#endif
}

// The nearest number that T holds, where infinity would do harm.
template <class T>
FACELT_HOST_DEVICE Compute<T> within_range(Compute<T> value) {
  if (Scalar<T>::kType != ScalarType::kFloat16) return value;
  constexpr Compute<T> kLargest = 65504;
  return value > kLargest ? kLargest : value < -kLargest ? -kLargest : value;
}

// Calls function(T{}) with the storage type of a floating dtype.
template <class Function>
void dispatch_floating(ScalarType dtype, const char* name, Function&& function) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return function(double{});
    case ScalarType::kFloat32:
      return function(float{});
    case ScalarType::kBFloat16:
      return function(BFloat16{});
    case ScalarType::kFloat16:
      return function(Float16{});
    default:
      throw std::invalid_argument(std::string(name) + ": expected a floating dtype, got " +
                                  name_of(dtype));
  }
}

// Calls function(S{}, T{}) for two equal dtypes, or for float32 and a half type.
template <class Function>
void dispatch_pair(ScalarType first, ScalarType second, const char* first_name,
                   const char* second_name, Function&& function) {
  dispatch_floating(first, first_name, [&](auto s) {
    dispatch_floating(second, second_name, [&](auto t) {
      using S = decltype(s);
      using T = decltype(t);
      constexpr bool kSame = Scalar<S>::kType == Scalar<T>::kType;
      constexpr bool kWide =
          Scalar<S>::kType == ScalarType::kFloat32 || Scalar<T>::kType == ScalarType::kFloat32;
      constexpr bool kDouble =
          Scalar<S>::kType == ScalarType::kFloat64 || Scalar<T>::kType == ScalarType::kFloat64;
      if constexpr (kSame || (kWide && !kDouble)) {
        function(s, t);
      } else {
        throw std::invalid_argument(std::string(first_name) + ": no kernel takes " +
                                    name_of(first) + " with " + second_name + " of " +
                                    name_of(second));
      }
    });
  });
}

}  // namespace facelt
