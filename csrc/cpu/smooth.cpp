// smooth_vjp and smooth_jvp on the CPU.
#include "kernel_set.h"

#include <algorithm>
#include <string>

#include "layout.h"

namespace emr::cpu {
namespace {

Smooth smooth_kind(const std::string& name) {
  constexpr const char* kNames[] = {"gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) {
      return static_cast<Smooth>(i);
    }
  }
  STD_TORCH_CHECK(false, "unknown function: ", name);
}

void run(const SmoothTask& task, const Tensor& like, const std::string& kind) {
  const int64_t numel = like.numel();
  const SmoothKernel kernel = kernel_set().smooth(dtype_of(like), smooth_kind(kind), task.cotangent != nullptr);
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    kernel(task, begin * kBlock, std::min(end * kBlock, numel));
  });
}

}  // namespace

void smooth_vjp_out(const Tensor& vector, const Tensor& input, const std::string& kind, const Tensor& out) {
  const bool channels_last = channels_last_order(vector);
  check_same(input, vector, channels_last);
  check_same(out, vector, channels_last);
  run({vector.const_data_ptr(), input.const_data_ptr(), nullptr, out.mutable_data_ptr(), nullptr}, vector, kind);
}

Tensor smooth_vjp(const Tensor& vector, const Tensor& input, const std::string& kind) {
  Tensor out = torch::stable::empty_like(vector);
  smooth_vjp_out(vector, input, kind, out);
  return out;
}

Tensor smooth_jvp_out(
    const Tensor& tangent, const Tensor& input, const Tensor& cotangent, const std::string& kind, const Tensor& out) {
  const bool channels_last = channels_last_order(tangent);
  check_same(input, tangent, channels_last);
  check_same(cotangent, tangent, channels_last);
  check_same(out, tangent, channels_last);
  Tensor bend = torch::stable::empty_like(tangent);
  if (tangent.numel() > 0) {
    run({tangent.const_data_ptr(), input.const_data_ptr(), cotangent.const_data_ptr(), out.mutable_data_ptr(),
         bend.mutable_data_ptr()},
        tangent, kind);
  }
  return bend;
}

std::tuple<Tensor, Tensor> smooth_jvp(
    const Tensor& tangent, const Tensor& input, const Tensor& cotangent, const std::string& kind) {
  Tensor out = torch::stable::empty_like(tangent);
  Tensor bend = smooth_jvp_out(tangent, input, cotangent, kind, out);
  return {std::move(out), std::move(bend)};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("smooth_vjp", TORCH_BOX(&emr::cpu::smooth_vjp));
  m.impl("smooth_vjp_out", TORCH_BOX(&emr::cpu::smooth_vjp_out));
  m.impl("smooth_jvp", TORCH_BOX(&emr::cpu::smooth_jvp));
  m.impl("smooth_jvp_out", TORCH_BOX(&emr::cpu::smooth_jvp_out));
}
