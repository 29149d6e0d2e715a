// The kernels compiled for AVX-512 F, BW, DQ and VL.
#include "hyperplane.h"
#include "kernels.h"
#include "margins.h"
#include "products.h"
#include "rows.h"
#include "smooth.h"
#include "steps.h"
#include "winograd.h"

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

#include "vectors.inc"

#include "affine_relu.inc"
#include "masked_gemm.inc"
#include "winograd.inc"
#include "pairwise_margins.inc"
#include "steps.inc"
#include "hyperplane.inc"
#include "exp_log.inc"
#include "smooth.inc"
#include "rows.inc"
#include "logit_seeds.inc"
#include "robust_losses.inc"

}  // namespace avx512

const Kernels& kernels_avx512(Dtype dtype) { return avx512::table(dtype); }
const ProductKernels& product_kernels_avx512(Dtype dtype) { return avx512::product_table(dtype); }
DifferenceNorm difference_norm_avx512(Dtype dtype, NormOrder order) {
  return avx512::difference_norm_for(dtype, order);
}
SquareSum square_sum_avx512(Dtype dtype) { return avx512::square_sum_of(dtype); }
HyperplaneKernel hyperplane_kernel_avx512(Dtype dtype, bool l2) { return avx512::hyperplane_kernel_for(dtype, l2); }
const StepKernels& step_kernels_avx512(Dtype x, Dtype gradient) { return avx512::step_kernels_of(x, gradient); }
const RowKernels& row_kernels_avx512(Dtype dtype) { return avx512::row_table(dtype); }
SmoothKernel smooth_kernel_avx512(Dtype dtype, Smooth kind, bool both) {
  return avx512::smooth_kernel_for(dtype, kind, both);
}
const WinogradKernels& winograd_kernels_avx512() { return avx512::winograd_table; }

}  // namespace emr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
