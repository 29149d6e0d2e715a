// The kernels compiled for what every processor of the architecture has (SSE2 on x86-64).
#include "kernel_set.h"

#include <torch/headeronly/util/Half.h>

#if EMR_X86
#include <immintrin.h>
#endif

#define EMR_VECTOR_BYTES 16
#define EMR_INLINE_MEMBER inline __attribute__((always_inline))

namespace emr {
namespace baseline {

// Not inlined: a conversion is long, and a unit holds sixteen.
__attribute__((noinline)) static float half_to_float(uint16_t bits) {
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}
__attribute__((noinline)) static uint16_t float_to_half(float value) {
  return c10::detail::fp16_ieee_from_fp32_value(value);
}

#include "kernel_set.inc"

}  // namespace baseline

const KernelSet& kernel_set_baseline() { return baseline::all_kernels; }

}  // namespace emr
