// What every CUDA kernel needs: device and stream, launch check, sizes of grids, 16-byte loads and stores, reductions.
//
// Kernels take 64-bit sizes, allocate nothing, and leave the stream unsynchronised, so they can be captured in a CUDA
// graph. Each is declared `__global__ void __launch_bounds__(...)` with a number or a `constexpr int`, which is where the
// build's report on occupancies finds the threads of its blocks.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../layout.h"
#include "lanes.h"

#if !defined(USE_CUDA)
// Of torch/csrc/inductor/aoti_torch/c/shim.h, where it is hidden from whom USE_CUDA is not defined.
extern "C" AOTI_TORCH_EXPORT AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace emr::cuda {

inline constexpr int kWarp = 32;

// Makes a tensor's device the current one as long as it lives, and knows torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

// Directly after a launch: throws what the launch itself got wrong.
inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Blocks for so many pieces of work; the x dimension of a grid takes 2^31 - 1.
inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = divide_up(work, per_block);
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "a tensor too large for one launch");
  return static_cast<unsigned>(blocks);
}

// Calls f with a null pointer to float, emr::bf16 or emr::fp16, by the dtype of a tensor.
template <class F>
void by_dtype(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<fp16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16 on CUDA");
  }
}

// Calls f with std::true_type or std::false_type, to choose a template's argument.
template <class F>
void by_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// The sum over `width` neighbouring lanes (a power of two), the same in each; all lanes of the warp take part.
__device__ inline float sum_lanes(float x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, step, kWarp);
  }
  return x;
}
__device__ inline double sum_lanes(double x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, step, kWarp);
  }
  return x;
}
// A NaN among the lanes is kept.
__device__ inline float max_lanes(float x, int width = kWarp) {
  for (int step = width / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, step, kWarp);
    x = other > x || other != other ? other : x;
  }
  return x;
}

// The sum over a block of whole warps, the same in every thread and at every launch. `scratch`: kWarp shared values,
// free for another use after the next __syncthreads().
template <class A>
__device__ A sum_block(A x, A* scratch) {
  x = sum_lanes(x);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = x;
  }
  __syncthreads();
  A total = scratch[0];
  for (int w = 1; w < warps; ++w) {
    total += scratch[w];
  }
  return total;
}

}  // namespace emr::cuda
