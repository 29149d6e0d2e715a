// Checks of the operators that treat a tensor as a batch of samples [N, ...], whatever the device.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "layout.h"

namespace emr {

// Whether each sample's elements fill one stretch of memory, in any order.
inline bool dense_samples(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> inner;
  for (int64_t d = 1; d < t.dim(); ++d) {
    if (t.size(d) != 1) {
      inner.emplace_back(t.stride(d), t.size(d));
    }
  }
  std::sort(inner.begin(), inner.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : inner) {
    if (stride != expected) {
      return t.numel() == 0;
    }
    expected *= size;
  }
  return true;
}

inline void check_per_sample(const OptionalTensor& vector, ScalarType type, int64_t samples) {
  STD_TORCH_CHECK(
      !vector || (vector->scalar_type() == type && vector->is_contiguous() && vector->numel() == samples),
      "expected one contiguous value for each sample");
}

inline void check_norm(const std::string& norm) {
  STD_TORCH_CHECK(norm == "linf" || norm == "l2" || norm == "l1", "norm is ", norm, "; expected linf, l2 or l1");
}

// The tensors of pgd_step: in one memory order, origin and out of the dtype of x, the gradient of that dtype or of a
// narrower one beside float32.
inline void check_step(
    const Tensor& x, const Tensor& origin, const Tensor& gradient, const OptionalTensor& step_sizes,
    const std::string& norm, const OptionalTensor& counts, const Tensor& out) {
  STD_TORCH_CHECK(x.dim() >= 1, "expected [N, ...]");
  check_norm(norm);
  const bool channels_last = channels_last_order(x);
  check_same(origin, x, channels_last);
  check_same(out, x, channels_last);
  const ScalarType type = x.scalar_type(), narrow = gradient.scalar_type();
  STD_TORCH_CHECK(
      gradient.numel() == x.numel() && gradient.dim() == x.dim() &&
          (channels_last ? is_channels_last(gradient) : gradient.is_contiguous()),
      "expected a gradient in the memory order of x");
  STD_TORCH_CHECK(
      narrow == type ||
          (type == ScalarType::Float && (narrow == ScalarType::BFloat16 || narrow == ScalarType::Half)),
      "expected a gradient of the dtype of x, or a narrower one beside float32");
  check_per_sample(step_sizes, type == ScalarType::Double ? type : ScalarType::Float, x.size(0));
  check_per_sample(counts, ScalarType::Long, x.size(0));
}

}  // namespace emr
