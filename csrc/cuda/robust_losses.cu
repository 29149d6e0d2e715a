// robust_losses on a GPU: a few lanes, a warp or a block for each row.
#include "robust_losses.h"

#include <string>

#include "../row_kinds.h"
#include "teams.cuh"

namespace emr::cuda {
namespace {

// Blocks that an SM is to hold at least: with two rows in registers, one.
template <int count, int held>
inline constexpr int kBlocks = count * held > kManyHeld ? 1 : 2;

template <class T, int count, int held>
__global__ void __launch_bounds__(kThreads, kBlocks<count, held>) robust_losses_lanes_kernel(Losses<T> s, int width) {
  const TeamRow row(width, s.rows);
  loss_row<count, held>(LaneTeam{width}, s, row.n, row.active);
}

template <class T, int count>
__global__ void __launch_bounds__(kThreads) robust_losses_block_kernel(Losses<T> s) {
  __shared__ int64_t scratch[kWarp];
  loss_row<count, 0>(BlockTeam{scratch}, s, blockIdx.x, true);
}

template <class T, int count>
void launch(const Losses<T>& s, cudaStream_t stream) {
  const int64_t classes = s.options.classes;
  const int held = held_for(classes);
  if (held == 0) {
    robust_losses_block_kernel<T, count><<<blocks_for(s.rows, 1), kThreads, 0, stream>>>(s);
  } else {
    const int width = team_width(classes, held);
    const unsigned blocks = blocks_for(s.rows, kThreads / width);
    if (held == kFewHeld) {
      robust_losses_lanes_kernel<T, count, kFewHeld><<<blocks, kThreads, 0, stream>>>(s, width);
    } else {
      robust_losses_lanes_kernel<T, count, kManyHeld><<<blocks, kThreads, 0, stream>>>(s, width);
    }
  }
  check_launch("robust_losses");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> robust_losses(
    const Tensor& adversarial, const OptionalTensor& clean, const OptionalTensor& y, const OptionalTensor& weights,
    const std::string& kind, double beta, double smoothing, bool mail, double slope, double bias) {
  check_logits(adversarial, 2);
  const int64_t rows = adversarial.size(0), classes = adversarial.size(1);
  const rows::LossOptions options{loss_kind(kind), beta, smoothing, mail, slope, bias, static_cast<int>(classes)};
  check_loss_arguments(options, adversarial, clean, y, weights, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(adversarial, {rows}, ScalarType::Float);
  Tensor grad = torch::stable::new_empty(adversarial, {rows, classes}, ScalarType::Float);
  Tensor clean_grad = clean ? torch::stable::new_empty(adversarial, {rows, classes}, ScalarType::Float)
                            : torch::stable::new_empty(adversarial, {0}, ScalarType::Float);
  const int64_t* label = class_indices(y, adversarial);
  if (rows > 0) {
    const OnDeviceOf device(adversarial);
    by_dtype(adversarial, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const void *first = adversarial.const_data_ptr(), *second = clean ? clean->const_data_ptr() : nullptr;
      const Losses<T> s{
          {static_cast<const T*>(first), static_cast<const T*>(second)},
          label,
          weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr,
          static_cast<float*>(loss.mutable_data_ptr()),
          {static_cast<float*>(grad.mutable_data_ptr()), static_cast<float*>(clean_grad.mutable_data_ptr())},
          rows,
          options,
          classes % kLanes<T> == 0 && is_aligned(first) && is_aligned(second) && is_aligned(grad.const_data_ptr()) &&
              is_aligned(clean_grad.const_data_ptr())};
      clean ? launch<T, 2>(s, device.stream()) : launch<T, 1>(s, device.stream());
    });
  }
  return {std::move(loss), std::move(grad), std::move(clean_grad)};
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("robust_losses", TORCH_BOX(&emr::cuda::robust_losses));
}
