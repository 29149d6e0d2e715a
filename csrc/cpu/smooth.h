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

}  // namespace emr
