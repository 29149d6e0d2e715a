// The interface between pairwise_margins and its kernel, one for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

enum class NormOrder { one, two, inf };

// Σ |a - b|, Σ (a - b)² or max |a - b| over at most a block of elements; a NaN is kept.
using DifferenceNorm = double (*)(const void* a, const void* b, int64_t size);

}  // namespace emr
