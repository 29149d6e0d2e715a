// The operators of namespace `emr` as C++ functions on stable-ABI tensors; their specification is in emr_kernels/ops.
// Tensors arrive checked and dense, a second tensor in the memory order of the first, coefficients in the compute type.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace emr {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace cpu {

std::tuple<Tensor, Tensor> affine_relu(
    const Tensor& a, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& skip,
    double negative_slope);

void affine_relu_out(
    const Tensor& a, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& skip,
    double negative_slope, const Tensor& out, const Tensor& bits);

Tensor affine_relu_vjp(
    const Tensor& delta, const Tensor& bits, const OptionalTensor& scale, double negative_slope);

void affine_relu_vjp_out(
    const Tensor& delta, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& out);

std::tuple<Tensor, Tensor> affine_relu_jvp(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta);

Tensor affine_relu_jvp_out(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta,
    const Tensor& out);

Tensor pack_bits(const Tensor& mask);

}  // namespace cpu
}  // namespace emr
