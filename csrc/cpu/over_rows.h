// What the operators over rows of logits share on the CPU: the check of class indices, and the walk over rows.
#pragma once

#include <memory>

#include "../row_kinds.h"
#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {

// Pointer to class indices, all in range; null where there are none.
inline const int64_t* checked_classes(const OptionalTensor& classes, const Tensor& logits) {
  const int64_t* values = class_indices(classes, logits);
  for (int64_t i = 0; values != nullptr && i < logits.size(0); ++i) {
    STD_TORCH_CHECK(values[i] >= 0 && values[i] < logits.size(1), "class index ", values[i], " is out of range");
  }
  return values;
}

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(kernels, begin, end, scratch) on ranges of rows, in parallel.
template <class F>
void over_rows(const Tensor& logits, const F& f) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const RowKernels& kernels = kernel_set().rows(dtype_of(logits));
  // A task is a unit of rows or a row; a thread gets enough of them to pay for itself.
  const int64_t together = classes <= kStackedClasses ? kUnit : 1;
  const int64_t tasks = (rows + together - 1) / together;
  const int64_t grain = 1 + kBlock / 4 / (together * classes);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kAlign = 64;
    const size_t bytes = row_scratch(classes) * (compute_type(logits) == ScalarType::Double ? 8 : 4);
    size_t space = bytes + kAlign;
    std::unique_ptr<char[]> owned(new char[space]);
    void* scratch = owned.get();
    std::align(kAlign, bytes, scratch, space);
    f(kernels, begin * together, std::min(end * together, rows), scratch);
  });
}

}  // namespace emr::cpu
