// The kernels compiled for AVX2, FMA and F16C.
#include "kernel_set.h"

#if EMR_X86
#include <immintrin.h>

// A pragma, not a compiler flag: functions of the headers above stay callable on every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define EMR_VECTOR_BYTES 32
#define EMR_INLINE_MEMBER inline __attribute__((always_inline))

namespace emr {
namespace avx2 {

#include "kernel_set.inc"

}  // namespace avx2

const KernelSet& kernel_set_avx2() { return avx2::all_kernels; }

}  // namespace emr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
