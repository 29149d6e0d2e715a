// What the kernels' host code checks of its tensors, whatever the device: the raw operators trust nobody with pointers.
#pragma once

#include "ops.h"

namespace emr {

using torch::headeronly::ScalarType;

// Whether the channels lie innermost: strides of a dense [N, ..., C] seen as [N, C, ...].
inline bool is_channels_last(const Tensor& t) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  const int64_t dims = t.dim();
  if (dims < 3) {
    return false;
  }
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  bool ok = fits(1);
  for (int64_t d = dims - 1; d >= 2; --d) {
    ok = fits(d) && ok;
  }
  return fits(0) && ok;
}

// Every tensor must be dense in one order.
inline bool channels_last_order(const Tensor& t) {
  if (t.is_contiguous()) {
    return false;
  }
  STD_TORCH_CHECK(is_channels_last(t), "expected a tensor dense in row-major or channels-last order");
  return true;
}

inline void check_same(const Tensor& t, const Tensor& like, bool channels_last) {
  STD_TORCH_CHECK(
      t.numel() == like.numel() && t.dim() == like.dim() && t.scalar_type() == like.scalar_type() &&
          (channels_last ? is_channels_last(t) : t.is_contiguous()),
      "expected tensors of one shape, dtype and memory order");
}

inline void check_bits(const Tensor& bits, const Tensor& like) {
  STD_TORCH_CHECK(
      bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.numel() == (like.numel() + 7) / 8,
      "expected one contiguous bit for each element");
}

inline Tensor new_bits(const Tensor& like) {
  return torch::stable::new_empty(like, {(like.numel() + 7) / 8}, ScalarType::Byte);
}

}  // namespace emr
