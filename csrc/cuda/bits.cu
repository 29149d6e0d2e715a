// pack_bits on a GPU.
#include "bits.h"
#include "launch.cuh"

namespace emr::cuda {
namespace {

template <bool aligned>
__global__ void __launch_bounds__(kThreads) pack_bits_kernel(const uint8_t* source, uint8_t* target, int64_t numel) {
  pack_bits_thread<aligned>(source, target, numel, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

}  // namespace

Tensor pack_bits(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "expected a bool tensor");
  channels_last_order(mask);
  const OnDeviceOf device(mask);
  Tensor bits = new_bits(mask);
  const int64_t numel = mask.numel();
  if (numel > 0) {
    const auto* source = static_cast<const uint8_t*>(mask.const_data_ptr());
    auto* target = static_cast<uint8_t*>(bits.mutable_data_ptr());
    const unsigned blocks = blocks_for(numel, kThreads * kPackedByThread);
    if (is_aligned(source)) {
      pack_bits_kernel<true><<<blocks, kThreads, 0, device.stream()>>>(source, target, numel);
    } else {
      pack_bits_kernel<false><<<blocks, kThreads, 0, device.stream()>>>(source, target, numel);
    }
    check_launch("pack_bits");
  }
  return bits;
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&emr::cuda::pack_bits));
}
