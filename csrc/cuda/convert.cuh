// Narrow floating types by their bits, rounded to nearest even as on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../order.h"
#include "tables.h"

namespace jackpot {

__device__ inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

__device__ inline float float_of_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = bits_float(magnitude << 13) * 0x1p112f;  // exact, subnormal numbers too
  return bits_float(sign | float_bits(scaled));
}

__device__ inline uint16_t float16_of(float value) {
  const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds where the last bit is
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

__device__ inline uint32_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Through float64, which every dtype here converts to exactly.
__device__ inline double load_as_double(const void* from, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::kFloat64:
      return static_cast<const double*>(from)[at];
    case Dtype::kBFloat16:
      return bits_float(static_cast<uint32_t>(static_cast<const uint16_t*>(from)[at]) << 16);
    case Dtype::kFloat16:
      return float_of_float16(static_cast<const uint16_t*>(from)[at]);
    default:
      return static_cast<const float*>(from)[at];
  }
}

__device__ inline void store_as(void* to, Dtype dtype, int64_t at, double value) {
  switch (dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(to)[at] = value;
      break;
    case Dtype::kBFloat16:
      static_cast<uint16_t*>(to)[at] = bfloat16_of(static_cast<float>(value));
      break;
    case Dtype::kFloat16:
      static_cast<uint16_t*>(to)[at] = float16_of(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(to)[at] = static_cast<float>(value);
  }
}

}  // namespace jackpot
