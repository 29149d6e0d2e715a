// pgd_start on a GPU.
#include <string>

#include "../philox.h"
#include "../samples.h"
#include "launch.cuh"

namespace emr::cuda {
namespace {

struct StartArguments {
  const void* origin;
  void* out;
  int64_t numel;
  int64_t size;  // elements of a sample
  Random random;
  float epsilon;
  float lower;
  float upper;

  template <class T>
  __device__ __forceinline__ void write(int64_t i, float noise) const {
    float t = to_float(static_cast<const T*>(origin)[i]) + noise;
    t = t < lower ? lower : t;
    t = t > upper ? upper : t;
    round_to(static_cast<T*>(out)[i], t);
  }
};

// Four elements, which share a block of Philox, for each thread.
template <class T>
__global__ void __launch_bounds__(kThreads) linf_start_kernel(const StartArguments s) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Words words = s.random.words(block, 0);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (4 * block + k < s.numel) {
      s.write<T>(4 * block + k, s.epsilon * signed_uniform<float>(words.w[k]));
    }
  }
}

// Calls f(i, z) for the draws z of this thread's elements i of [begin, end).
template <bool gaussian, class F>
__device__ __forceinline__ void over_draws(const Random& random, int64_t begin, int64_t end, const F& f) {
  for (int64_t block = begin / 4 + threadIdx.x; 4 * block < end; block += blockDim.x) {
    float z[4];
    const Words words = random.words(block, 0);
    gaussian ? gaussians(words, z) : laplacians(words, z);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t i = 4 * block + k;
      if (i >= begin && i < end) {
        f(i, z[k]);
      }
    }
  }
}

// One sample for each block. The draws are made twice: once for their sum, once to be written.
template <class T, bool gaussian>
__global__ void __launch_bounds__(kThreads) ball_start_kernel(const StartArguments s) {
  __shared__ float scratch[kWarp];
  const int64_t n = blockIdx.x, begin = n * s.size, end = begin + s.size;
  float sum = 0;
  over_draws<gaussian>(s.random, begin, end, [&](int64_t, float z) { sum += gaussian ? z * z : fabsf(z); });
  const float total = sum_block(sum, scratch);
  const float once = unit_uniform<float>(s.random.words(n, 1).w[0]);
  const float radius = gaussian ? s.epsilon * powf(once, 1.0f / static_cast<float>(s.size)) : s.epsilon;
  const float length = gaussian ? sqrtf(total) : total - logf(once);
  constexpr float kSmallest = 1.17549435e-38f;
  const float scale = radius / (length < kSmallest ? kSmallest : length);
  over_draws<gaussian>(s.random, begin, end, [&](int64_t i, float z) { s.write<T>(i, z * scale); });
}

}  // namespace

Tensor pgd_start(
    const Tensor& origin, double epsilon, std::string norm, int64_t seed, int64_t offset, double lower, double upper) {
  STD_TORCH_CHECK(origin.dim() >= 1, "expected [N, ...]");
  check_norm(norm);
  channels_last_order(origin);
  const OnDeviceOf device(origin);
  Tensor out = torch::stable::empty_like(origin);
  const int64_t numel = origin.numel();
  if (numel == 0) {
    return out;
  }
  const int64_t samples = origin.size(0);
  const StartArguments s{
      origin.const_data_ptr(),
      out.mutable_data_ptr(),
      numel,
      numel / samples,
      {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)},
      static_cast<float>(epsilon),
      static_cast<float>(lower),
      static_cast<float>(upper)};
  by_dtype(origin, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    if (norm == "linf") {
      linf_start_kernel<T><<<blocks_for(numel, 4 * kThreads), kThreads, 0, device.stream()>>>(s);
    } else if (norm == "l2") {
      ball_start_kernel<T, true><<<blocks_for(samples, 1), kThreads, 0, device.stream()>>>(s);
    } else {
      ball_start_kernel<T, false><<<blocks_for(samples, 1), kThreads, 0, device.stream()>>>(s);
    }
  });
  check_launch("pgd_start");
  return out;
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("pgd_start", TORCH_BOX(&emr::cuda::pgd_start));
}
