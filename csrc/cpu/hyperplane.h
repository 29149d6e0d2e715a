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

}  // namespace emr
