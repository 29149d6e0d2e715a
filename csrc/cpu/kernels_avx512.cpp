// The kernels compiled for AVX-512 F, BW, DQ and VL.
#include "kernel_set.h"

#if EMR_X86
#include <immintrin.h>

// A pragma, not a compiler flag: functions of the headers above stay callable on every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define EMR_VECTOR_BYTES 64
#define EMR_INLINE_MEMBER inline __attribute__((always_inline))

namespace emr {
namespace avx512 {

#include "kernel_set.inc"

}  // namespace avx512

const KernelSet& kernel_set_avx512() { return avx512::all_kernels; }

}  // namespace emr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
