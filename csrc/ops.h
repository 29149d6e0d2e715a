// What every operator's C++ sees of torch: stable-ABI tensors. The operators are specified in emr_kernels/ops and defined
// there, in Python; each file here registers its kernels at its end. Tensors arrive checked and dense, a second tensor in
// the memory order of the first, coefficients in the compute type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace emr {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace emr
