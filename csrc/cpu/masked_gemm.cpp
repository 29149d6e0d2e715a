// masked_gemm and masked_chain on the CPU.
#include <string>

#include "kernel_set.h"
#include "masked_chain.h"

namespace emr::cpu {
namespace {

ScalarType compute_type_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The task without its result; empty tensors are fine.
ChainTask task_of(
    const Tensor& grad, const std::vector<Tensor>& bits, const std::vector<Tensor>& weights,
    const std::vector<double>& slopes) {
  STD_TORCH_CHECK(grad.dim() == 3, "expected grad [N, K, H]");
  const int64_t samples = grad.size(0), rows = grad.size(1);
  int64_t units = grad.size(2);
  STD_TORCH_CHECK(
      grad.numel() == 0 ||
          ((units == 1 || grad.stride(2) == 1) && (rows == 1 || grad.stride(1) == units) && grad.stride(0) >= 0),
      "expected a grad whose samples are dense");
  STD_TORCH_CHECK(
      !weights.empty() && bits.size() == weights.size() && slopes.size() == weights.size(),
      "expected bits, a weight and a slope for each link");
  ChainTask task{};
  task.grad = static_cast<const char*>(grad.const_data_ptr());
  task.stride = samples == 1 ? 0 : grad.stride(0);
  task.samples = samples;
  task.rows = rows;
  task.element = static_cast<int64_t>(grad.element_size());
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor &weight = weights[l], &mask = bits[l];
    STD_TORCH_CHECK(
        weight.dim() == 2 && weight.size(0) == units && weight.scalar_type() == grad.scalar_type() &&
            weight.is_contiguous() && units <= INT32_MAX,
        "expected contiguous weights [H, D] of the dtype of grad, each as wide as the next is high");
    STD_TORCH_CHECK(
        mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == (samples * units + 7) / 8,
        "expected one contiguous bit for each unit of each sample");
    task.links.push_back(
        {static_cast<const uint8_t*>(mask.const_data_ptr()),
         static_cast<const char*>(weight.const_data_ptr()),
         units,
         weight.size(1),
         slopes[l]});
    units = weight.size(1);
  }
  return task;
}

void run(const ChainTask& task, const Tensor& grad, const Tensor& result) {
  const bool nothing = std::any_of(task.links.begin(), task.links.end(), [](const Link& link) {
    return link.units == 0 || link.columns == 0;
  });
  if (result.numel() == 0) {
    return;
  }
  if (nothing) {
    std::memset(result.mutable_data_ptr(), 0, result.numel() * result.element_size());
    return;
  }
  const ProductKernels& kernels = kernel_set().products(dtype_of(grad));
  if (grad.scalar_type() == ScalarType::Double) {
    Chain<double>(task, kernels).run();
  } else {
    Chain<float>(task, kernels).run();
  }
}

}  // namespace

// `precision` is for GPUs: a CPU is always exact.
Tensor masked_chain(
    const Tensor& grad, std::vector<Tensor> bits, std::vector<Tensor> weights, std::vector<double> negative_slopes,
    const std::string&) {
  ChainTask task = task_of(grad, bits, weights, negative_slopes);
  Tensor out = torch::stable::new_empty(grad, {task.samples, task.rows, task.links.back().columns});
  task.out = static_cast<char*>(out.mutable_data_ptr());
  run(task, grad, out);
  return out;
}

Tensor masked_chain_sq_norms(
    const Tensor& grad, std::vector<Tensor> bits, std::vector<Tensor> weights, std::vector<double> negative_slopes,
    const std::string&) {
  ChainTask task = task_of(grad, bits, weights, negative_slopes);
  Tensor squares = torch::stable::new_empty(grad, {task.samples, task.rows}, compute_type_of(grad));
  task.squares = squares.mutable_data_ptr();
  run(task, grad, squares);
  return squares;
}

Tensor masked_gemm(
    const Tensor& grad, const Tensor& bits, const Tensor& weight, double negative_slope, const std::string& precision) {
  return masked_chain(grad, {bits}, {weight}, {negative_slope}, precision);
}

Tensor masked_gemm_sq_norms(
    const Tensor& grad, const Tensor& bits, const Tensor& weight, double negative_slope, const std::string& precision) {
  return masked_chain_sq_norms(grad, {bits}, {weight}, {negative_slope}, precision);
}

void masked_gemm_out(
    const Tensor& grad, const Tensor& bits, const Tensor& weight, double negative_slope, const std::string&,
    const Tensor& out) {
  ChainTask task = task_of(grad, {bits}, {weight}, {negative_slope});
  STD_TORCH_CHECK(
      out.is_contiguous() && out.scalar_type() == grad.scalar_type() && out.dim() == 3 &&
          out.size(0) == task.samples && out.size(1) == task.rows && out.size(2) == weight.size(1),
      "expected a contiguous out [N, K, D] of the dtype of grad");
  task.out = static_cast<char*>(out.mutable_data_ptr());
  run(task, grad, out);
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("masked_chain", TORCH_BOX(&emr::cpu::masked_chain));
  m.impl("masked_chain_sq_norms", TORCH_BOX(&emr::cpu::masked_chain_sq_norms));
  m.impl("masked_gemm", TORCH_BOX(&emr::cpu::masked_gemm));
  m.impl("masked_gemm_out", TORCH_BOX(&emr::cpu::masked_gemm_out));
  m.impl("masked_gemm_sq_norms", TORCH_BOX(&emr::cpu::masked_gemm_sq_norms));
}
