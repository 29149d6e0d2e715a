// Arithmetic that the CPU and the GPU share: number types, conversions, and each operator's formula. Nothing is
// contracted to a fused multiply-add (the build says so to both compilers), so both round alike; where an fma is wanted,
// call fmaf. Functions are static: a file compiled for one instruction set must not lend its copy to the others.
#pragma once

#include <cstdint>
#include <cstring>

#include <torch/headeronly/util/Half.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EMR_HOST_DEVICE __host__ __device__
#else
#define EMR_HOST_DEVICE
#endif

namespace emr {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
EMR_HOST_DEVICE static inline To bits_as(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

EMR_HOST_DEVICE static inline float to_float(float x) { return x; }
EMR_HOST_DEVICE static inline float to_float(bf16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
EMR_HOST_DEVICE static inline float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bits_as<__half>(x));
#else
  return c10::detail::fp16_ieee_to_fp32_value(x.bits);
#endif
}

// Rounds to the nearest, ties to even; a NaN stays one.
EMR_HOST_DEVICE static inline void round_to(float& result, float x) { result = x; }
EMR_HOST_DEVICE static inline void round_to(bf16& result, float x) {
#if defined(__CUDA_ARCH__)
  result = bits_as<bf16>(__float2bfloat16_rn(x));
#else
  const uint32_t w = bits_as<uint32_t>(x);
  result.bits = static_cast<uint16_t>(x == x ? (w + 0x7fff + ((w >> 16) & 1)) >> 16 : (w >> 16) | 0x40);
#endif
}
EMR_HOST_DEVICE static inline void round_to(fp16& result, float x) {
#if defined(__CUDA_ARCH__)
  result = bits_as<fp16>(__float2half_rn(x));
#else
  result.bits = c10::detail::fp16_ieee_from_fp32_value(x);
#endif
}

template <class T>
EMR_HOST_DEVICE static inline T rounded(float x) {
  T result;
  round_to(result, x);
  return result;
}

// y of affine_relu from t = a * scale + shift + skip; a NaN stays one.
EMR_HOST_DEVICE static inline float leaky_relu(float t, float slope) {
  if (slope != 0) {
    return t > 0 ? t : t * slope;
  }
  return t <= 0 ? 0.0f : t;
}

// x * slope(bit); a slope of 0 gives 0 for an infinite or undefined x as well.
EMR_HOST_DEVICE static inline float masked(float x, bool bit, float slope) {
  return bit ? x : slope != 0 ? x * slope : 0.0f;
}

}  // namespace emr
