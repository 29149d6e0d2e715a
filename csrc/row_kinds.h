// What the host code of logit_seeds and robust_losses checks of its arguments, on every device.
#pragma once

#include <string>

#include "layout.h"
#include "row_formulas.h"

namespace emr {

inline rows::SeedKind seed_kind(const std::string& name) {
  constexpr const char* kNames[] = {"softmax", "label", "margin", "ce", "cw", "dlr", "ce_targeted", "dlr_targeted"};
  for (int i = 0; i < 8; ++i) {
    if (name == kNames[i]) {
      return static_cast<rows::SeedKind>(i);
    }
  }
  STD_TORCH_CHECK(false, "unknown kind of seed: ", name);
}

inline rows::LossKind loss_kind(const std::string& name) {
  constexpr const char* kNames[] = {"ce", "kl", "trades", "mart"};
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) {
      return static_cast<rows::LossKind>(i);
    }
  }
  STD_TORCH_CHECK(false, "unknown kind of loss: ", name);
}

inline void check_logits(const Tensor& t, int64_t least) {
  constexpr int64_t kMost = int64_t{1} << 30;  // classes are counted in 32 bits
  STD_TORCH_CHECK(
      t.dim() == 2 && t.is_contiguous() && t.size(1) >= least && t.size(1) <= kMost,
      "expected contiguous logits [N, C] with enough classes");
}

// Pointer to class indices, one for each row; null where there are none.
inline const int64_t* class_indices(const OptionalTensor& classes, const Tensor& logits) {
  if (!classes) {
    return nullptr;
  }
  STD_TORCH_CHECK(
      classes->scalar_type() == ScalarType::Long && classes->is_contiguous() && classes->numel() == logits.size(0),
      "expected one contiguous int64 class index for each row");
  return static_cast<const int64_t*>(classes->const_data_ptr());
}

inline void check_loss_arguments(
    const rows::LossOptions& options, const Tensor& adversarial, const OptionalTensor& clean, const OptionalTensor& y,
    const OptionalTensor& weights, ScalarType wide) {
  STD_TORCH_CHECK(options.has_clean() == clean.has_value(), "expected clean logits for every kind but ce");
  STD_TORCH_CHECK(y || (options.kind == rows::LossKind::kl && !options.mail), "expected class indices");
  if (clean) {
    check_same(*clean, adversarial, false);
  }
  if (weights) {
    STD_TORCH_CHECK(
        weights->scalar_type() == wide && weights->is_contiguous() && weights->numel() == adversarial.size(0),
        "expected one contiguous weight of the compute type for each row");
  }
}

}  // namespace emr
