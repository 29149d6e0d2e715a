// All kernels of one instruction set, and the set that this processor gets.
#pragma once

#include "hyperplane.h"
#include "isa.h"
#include "kernels.h"
#include "margins.h"
#include "products.h"
#include "rows.h"
#include "smooth.h"
#include "steps.h"
#include "winograd.h"

namespace emr {

// kernel_set.inc fills it, in this order.
struct KernelSet {
  const Kernels& (*affine_relu)(Dtype dtype);
  const ProductKernels& (*products)(Dtype dtype);
  const WinogradKernels& winograd;
  DifferenceNorm (*difference_norm)(Dtype dtype, NormOrder order);
  const StepKernels& (*steps)(Dtype x, Dtype gradient);
  SquareSum (*square_sum)(Dtype dtype);
  HyperplaneKernel (*hyperplane)(Dtype dtype, bool l2);
  SmoothKernel (*smooth)(Dtype dtype, Smooth kind, bool both);
  const RowKernels& (*rows)(Dtype dtype);
};

const KernelSet& kernel_set_baseline();
#if EMR_X86
const KernelSet& kernel_set_avx2();
const KernelSet& kernel_set_avx512();
#endif

inline const KernelSet& kernel_set() {
  static const Isa isa = chosen_isa();
#if EMR_X86
  if (isa == Isa::avx512) {
    return kernel_set_avx512();
  }
  if (isa == Isa::avx2) {
    return kernel_set_avx2();
  }
#endif
  return kernel_set_baseline();
}

}  // namespace emr
