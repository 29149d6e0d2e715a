// The kernels compiled for what every processor of the architecture has (SSE2 on x86-64).
#include "hyperplane.h"
#include "kernels.h"
#include "margins.h"
#include "products.h"
#include "rows.h"
#include "smooth.h"
#include "steps.h"
#include "winograd.h"

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

}  // namespace baseline

const Kernels& kernels_baseline(Dtype dtype) { return baseline::table(dtype); }
const ProductKernels& product_kernels_baseline(Dtype dtype) { return baseline::product_table(dtype); }
DifferenceNorm difference_norm_baseline(Dtype dtype, NormOrder order) {
  return baseline::difference_norm_for(dtype, order);
}
SquareSum square_sum_baseline(Dtype dtype) { return baseline::square_sum_of(dtype); }
HyperplaneKernel hyperplane_kernel_baseline(Dtype dtype, bool l2) { return baseline::hyperplane_kernel_for(dtype, l2); }
const StepKernels& step_kernels_baseline(Dtype x, Dtype gradient) { return baseline::step_kernels_of(x, gradient); }
const RowKernels& row_kernels_baseline(Dtype dtype) { return baseline::row_table(dtype); }
SmoothKernel smooth_kernel_baseline(Dtype dtype, Smooth kind, bool both) {
  return baseline::smooth_kernel_for(dtype, kind, both);
}
const WinogradKernels& winograd_kernels_baseline() { return baseline::winograd_table; }

}  // namespace emr
