// What the operators over rows of logits share: checks of what the kernels would crash on, and the walk over rows.
#pragma once

#include <memory>

#include "layout.h"
#include "rows.h"

namespace emr::cpu {

inline void check_logits(const Tensor& t, int64_t least) {
  constexpr int64_t kMost = int64_t{1} << 30;  // classes are counted in 32-bit lanes
  STD_TORCH_CHECK(
      t.dim() == 2 && t.is_contiguous() && t.size(1) >= least && t.size(1) <= kMost,
      "expected contiguous logits [N, C] with enough classes");
  dtype_of(t);
}

// Pointer to class indices, one for each row and all in range; null where there are none.
inline const int64_t* checked_classes(const OptionalTensor& classes, const Tensor& logits) {
  if (!classes) {
    return nullptr;
  }
  STD_TORCH_CHECK(
      classes->scalar_type() == ScalarType::Long && classes->is_contiguous() && classes->numel() == logits.size(0),
      "expected one contiguous int64 class index for each row");
  const auto* values = static_cast<const int64_t*>(classes->const_data_ptr());
  for (int64_t i = 0; i < logits.size(0); ++i) {
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
  const RowKernels& kernels = row_kernels(dtype_of(logits));
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
