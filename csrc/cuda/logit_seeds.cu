// logit_seeds on a GPU: a few lanes, a warp or a block for each row.
#include "logit_seeds.h"

#include <string>

#include "../row_kinds.h"
#include "teams.cuh"

namespace emr::cuda {
namespace {

template <class T, int ranks, int held>
__global__ void __launch_bounds__(kThreads, 2) logit_seeds_lanes_kernel(Seeds<T> s, int width) {
  const TeamRow row(width, s.rows);
  seed_row<ranks, held>(LaneTeam{width}, s, row.n, row.active);
}

template <class T, int ranks>
__global__ void __launch_bounds__(kThreads) logit_seeds_block_kernel(Seeds<T> s) {
  __shared__ int64_t scratch[kWarp];
  seed_row<ranks, 0>(BlockTeam{scratch}, s, blockIdx.x, true);
}

template <class T, int ranks>
void launch(const Seeds<T>& s, cudaStream_t stream) {
  const int held = held_for(s.classes);
  if (held == 0) {
    logit_seeds_block_kernel<T, ranks><<<blocks_for(s.rows, 1), kThreads, 0, stream>>>(s);
  } else {
    const int width = team_width(s.classes, held);
    const unsigned blocks = blocks_for(s.rows, kThreads / width);
    if (held == kFewHeld) {
      logit_seeds_lanes_kernel<T, ranks, kFewHeld><<<blocks, kThreads, 0, stream>>>(s, width);
    } else {
      logit_seeds_lanes_kernel<T, ranks, kManyHeld><<<blocks, kThreads, 0, stream>>>(s, width);
    }
  }
  check_launch("logit_seeds");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_seeds(
    const Tensor& logits, const OptionalTensor& y, const OptionalTensor& target, const std::string& kind,
    double temperature, bool center) {
  const rows::SeedKind which = seed_kind(kind);
  check_logits(logits, rows::least_classes(which));
  const int64_t rows = logits.size(0), classes = logits.size(1);
  Tensor seed = torch::stable::empty_like(logits);
  Tensor loss = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor margin = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  Tensor runner_up = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor probability_margin = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const int64_t *label = class_indices(y, logits), *goal = class_indices(target, logits);
  if (rows > 0) {
    const OnDeviceOf device(logits);
    by_dtype(logits, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const bool whole_vectors = classes % kLanes<T> == 0;
      const Seeds<T> s{
          static_cast<const T*>(logits.const_data_ptr()),
          label,
          goal,
          static_cast<T*>(seed.mutable_data_ptr()),
          static_cast<float*>(loss.mutable_data_ptr()),
          static_cast<float*>(margin.mutable_data_ptr()),
          static_cast<float*>(probability_margin.mutable_data_ptr()),
          static_cast<int64_t*>(runner_up.mutable_data_ptr()),
          rows,
          static_cast<int>(classes),
          which,
          static_cast<float>(temperature),
          center,
          whole_vectors && is_aligned(logits.const_data_ptr()) && is_aligned(seed.const_data_ptr())};
      rows::ranks_of(which) == 4 ? launch<T, 4>(s, device.stream()) : launch<T, 2>(s, device.stream());
    });
  }
  return {std::move(seed), std::move(loss), std::move(margin), std::move(runner_up), std::move(probability_margin)};
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("logit_seeds", TORCH_BOX(&emr::cuda::logit_seeds));
}
