// The interface between pairwise_margins and its kernel, one for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

enum class NormOrder { one, two, inf };

// Σ |a - b|, Σ (a - b)² or max |a - b| over at most a block of elements; a NaN is kept.
using DifferenceNorm = double (*)(const void* a, const void* b, int64_t size);

DifferenceNorm difference_norm_baseline(Dtype dtype, NormOrder order);
#if EMR_X86
DifferenceNorm difference_norm_avx2(Dtype dtype, NormOrder order);
DifferenceNorm difference_norm_avx512(Dtype dtype, NormOrder order);
#endif

inline DifferenceNorm difference_norm(Dtype dtype, NormOrder order) {
  static const Isa isa = chosen_isa();
#if EMR_X86
  if (isa == Isa::avx512) {
    return difference_norm_avx512(dtype, order);
  }
  if (isa == Isa::avx2) {
    return difference_norm_avx2(dtype, order);
  }
#endif
  return difference_norm_baseline(dtype, order);
}

}  // namespace emr
