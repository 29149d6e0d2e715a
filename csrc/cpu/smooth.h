// The interface between smooth_vjp and smooth_jvp and their kernels, one set for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

// f in out = f(input).
enum class Smooth { gelu, gelu_tanh, silu };

// slope: out = vector f'(input). both: that, and bend = vector cotangent f''(input).
struct SmoothTask {
  const void* vector;
  const void* input;
  const void* cotangent;  // null: slope
  void* out;              // may be the vector
  void* bend;             // may be the cotangent
};
using SmoothKernel = void (*)(const SmoothTask&, int64_t begin, int64_t end);

SmoothKernel smooth_kernel_baseline(Dtype dtype, Smooth kind, bool both);
#if EMR_X86
SmoothKernel smooth_kernel_avx2(Dtype dtype, Smooth kind, bool both);
SmoothKernel smooth_kernel_avx512(Dtype dtype, Smooth kind, bool both);
#endif

inline SmoothKernel smooth_kernel(Dtype dtype, Smooth kind, bool both) {
  static const Isa isa = chosen_isa();
#if EMR_X86
  if (isa == Isa::avx512) {
    return smooth_kernel_avx512(dtype, kind, both);
  }
  if (isa == Isa::avx2) {
    return smooth_kernel_avx2(dtype, kind, both);
  }
#endif
  return smooth_kernel_baseline(dtype, kind, both);
}

}  // namespace emr
