// The kernels compiled for AVX2, FMA and F16C.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define EMR_VECTOR_BYTES 32
#define EMR_INLINE_MEMBER inline __attribute__((always_inline))

namespace emr {
namespace avx2 {

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

}  // namespace avx2

const Kernels& kernels_avx2(Dtype dtype) { return avx2::table(dtype); }
const ProductKernels& product_kernels_avx2(Dtype dtype) { return avx2::product_table(dtype); }
DifferenceNorm difference_norm_avx2(Dtype dtype, NormOrder order) {
  return avx2::difference_norm_for(dtype, order);
}
SquareSum square_sum_avx2(Dtype dtype) { return avx2::square_sum_of(dtype); }
HyperplaneKernel hyperplane_kernel_avx2(Dtype dtype, bool l2) { return avx2::hyperplane_kernel_for(dtype, l2); }
const StepKernels& step_kernels_avx2(Dtype x, Dtype gradient) { return avx2::step_kernels_of(x, gradient); }
const RowKernels& row_kernels_avx2(Dtype dtype) { return avx2::row_table(dtype); }
SmoothKernel smooth_kernel_avx2(Dtype dtype, Smooth kind, bool both) {
  return avx2::smooth_kernel_for(dtype, kind, both);
}
const WinogradKernels& winograd_kernels_avx2() { return avx2::winograd_table; }

}  // namespace emr

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
