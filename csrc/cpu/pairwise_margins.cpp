// pairwise_margins on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {
namespace {

template <class A>
void margins_of(
    const Tensor& weights, const Tensor& logits, const Tensor& y, NormOrder order, const Tensor& result) {
  const int64_t samples = weights.size(0), classes = weights.size(1), size = weights.size(2);
  const int64_t element = static_cast<int64_t>(weights.element_size());
  const auto* const all = static_cast<const char*>(weights.const_data_ptr());
  const auto* const f = static_cast<const A*>(logits.const_data_ptr());
  const auto* const labels = static_cast<const int64_t*>(y.const_data_ptr());
  auto* const out = static_cast<A*>(result.mutable_data_ptr());
  const DifferenceNorm norm = kernel_set().difference_norm(dtype_of(weights), order);
  const int64_t grain = 1 + kBlock / std::max<int64_t>(1, classes * size);
  torch::stable::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> totals(classes);
    for (int64_t n = begin; n < end; ++n) {
      const char* const sample = all + n * classes * size * element;
      const int64_t label = labels[n];
      std::fill(totals.begin(), totals.end(), 0.0);
      // In blocks, so that the label's own weight is read from the nearest cache for every class.
      constexpr int64_t kNear = 2048;
      for (int64_t i = 0; i < size; i += kNear) {
        const int64_t count = std::min(kNear, size - i);
        for (int64_t j = 0; j < classes; ++j) {
          if (j != label) {
            const double part = norm(sample + (label * size + i) * element, sample + (j * size + i) * element, count);
            double& total = totals[j];
            total = order != NormOrder::inf ? total + part : part <= total || total != total ? total : part;
          }
        }
      }
      for (int64_t j = 0; j < classes; ++j) {
        const A gap = f[n * classes + label] - f[n * classes + j];
        const A length = static_cast<A>(order == NormOrder::two ? std::sqrt(totals[j]) : totals[j]);
        A& margin = out[n * classes + j];
        margin = j == label ? std::numeric_limits<A>::infinity() : gap == 0 && length == 0 ? A(0) : gap / length;
      }
    }
  });
}

}  // namespace

Tensor pairwise_margins(const Tensor& weights, const Tensor& logits, const Tensor& y, double ord) {
  const bool wide = weights.scalar_type() == ScalarType::Double;
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(weights.dim() == 3 && weights.is_contiguous(), "expected contiguous weights [N, K, D]");
  const int64_t samples = weights.size(0), classes = weights.size(1);
  STD_TORCH_CHECK(
      logits.dim() == 2 && logits.size(0) == samples && logits.size(1) == classes && logits.is_contiguous() &&
          logits.scalar_type() == type,
      "expected contiguous logits [N, K] of the compute type");
  STD_TORCH_CHECK(
      y.scalar_type() == ScalarType::Long && y.is_contiguous() && y.numel() == samples,
      "expected one contiguous int64 class index for each sample");
  const auto* const labels = static_cast<const int64_t*>(y.const_data_ptr());
  for (int64_t n = 0; n < samples; ++n) {
    STD_TORCH_CHECK(labels[n] >= 0 && labels[n] < classes, "class index ", labels[n], " is out of range");
  }
  STD_TORCH_CHECK(ord == 1 || ord == 2 || ord == std::numeric_limits<double>::infinity(), "ord is 1, 2 or inf");
  const NormOrder order = ord == 1 ? NormOrder::one : ord == 2 ? NormOrder::two : NormOrder::inf;
  Tensor result = torch::stable::new_empty(weights, {samples, classes}, type);
  if (wide) {
    margins_of<double>(weights, logits, y, order, result);
  } else {
    margins_of<float>(weights, logits, y, order, result);
  }
  return result;
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("pairwise_margins", TORCH_BOX(&emr::cpu::pairwise_margins));
}
