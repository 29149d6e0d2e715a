// to_hyperplane on the CPU.
#include <string>

#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {

std::tuple<Tensor, Tensor> to_hyperplane(const Tensor& x, const Tensor& w, const Tensor& gap, std::string norm) {
  STD_TORCH_CHECK(norm == "linf" || norm == "l2", "norm is '", norm, "'; expected 'linf' or 'l2'");
  STD_TORCH_CHECK(
      x.dim() == 2 && x.is_contiguous() && w.is_contiguous() && gap.is_contiguous() && gap.dim() == 1 &&
          w.dim() == 2 && w.size(0) == x.size(0) && w.size(1) == x.size(1) && gap.size(0) == x.size(0) &&
          w.scalar_type() == x.scalar_type() && gap.scalar_type() == x.scalar_type(),
      "expected contiguous x and w [M, D] and gap [M] of one dtype");
  Tensor d = torch::stable::empty_like(x);
  Tensor length = torch::stable::empty_like(gap);
  const int64_t size = x.size(1), padded = (size + kUnit - 1) / kUnit * kUnit;
  const HyperplaneTask task{x.const_data_ptr(), w.const_data_ptr(), gap.const_data_ptr(),
                            d.mutable_data_ptr(), length.mutable_data_ptr(), size};
  const HyperplaneKernel kernel = kernel_set().hyperplane(dtype_of(x), norm == "l2");
  const int64_t grain = 1 + kBlock / (16 * padded + 1);
  torch::stable::parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
    const Scratch<double> scratch(2 * padded);
    kernel(task, scratch.get(), begin, end);
  });
  return {d, length};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("to_hyperplane", TORCH_BOX(&emr::cpu::to_hyperplane));
}
