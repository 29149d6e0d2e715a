// The interface between to_hyperplane and its kernels, one set for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

// Rows of `size` elements; a gap and a length for each.
struct HyperplaneTask {
  const void* x;
  const void* w;
  const void* gap;
  void* d;
  void* length;
  int64_t size;
};
// Rows [begin, end); scratch: two rows of the compute type, of whole units.
using HyperplaneKernel = void (*)(const HyperplaneTask&, void* scratch, int64_t begin, int64_t end);

HyperplaneKernel hyperplane_kernel_baseline(Dtype dtype, bool l2);
#if EMR_X86
HyperplaneKernel hyperplane_kernel_avx2(Dtype dtype, bool l2);
HyperplaneKernel hyperplane_kernel_avx512(Dtype dtype, bool l2);
#endif

inline HyperplaneKernel hyperplane_kernel(Dtype dtype, bool l2) {
  static const Isa isa = chosen_isa();
#if EMR_X86
  if (isa == Isa::avx512) {
    return hyperplane_kernel_avx512(dtype, l2);
  }
  if (isa == Isa::avx2) {
    return hyperplane_kernel_avx2(dtype, l2);
  }
#endif
  return hyperplane_kernel_baseline(dtype, l2);
}

}  // namespace emr
