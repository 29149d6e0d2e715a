// pgd_step on a GPU: under Linf one pass over the elements, under L2 and L1 one block for each sample.
#include <string>

#include "../samples.h"
#include "pgd_step.cuh"

namespace emr::cuda {
namespace {

constexpr int kMostThreads = 1024;

// Chunks of C elements; with `each`, samples have step sizes of their own and are whole chunks long.
template <class X, class G, int C, bool each>
__global__ void __launch_bounds__(kThreads) linf_kernel(const StepArguments s) {
  const int64_t numel = s.samples * s.size;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * C;
  if (i >= numel) {
    return;
  }
  const float a = each ? s.step_sizes[i / s.size] : s.step_size;
  const X* x = static_cast<const X*>(s.x) + i;
  const X* origin = static_cast<const X*>(s.origin) + i;
  const G* gradient = static_cast<const G*>(s.gradient) + i;
  X* out = static_cast<X*>(s.out) + i;
  if (C == 1 || i + C <= numel) {
    float t[C], o[C], g[C];
    load_chunk(x, t);
    load_chunk(origin, o);
    load_chunk(gradient, g);
#pragma unroll
    for (int k = 0; k < C; ++k) {
      t[k] = linf_step(t[k], o[k], g[k], a, s.epsilon, s.lower, s.upper);
    }
    store_chunk(out, t);
  } else {
    for (int64_t k = 0; k < numel - i; ++k) {
      const float t = linf_step(
          to_float(x[k]), to_float(origin[k]), to_float(gradient[k]), a, s.epsilon, s.lower, s.upper);
      round_to(out[k], t);
    }
  }
}

template <class X, class G>
void launch_linf(const StepArguments& s, cudaStream_t stream) {
  const int64_t numel = s.samples * s.size;
  const bool each = s.step_sizes != nullptr;
  // Without step sizes of their own, samples do not matter, and a last chunk may be incomplete.
  const bool chunked = is_chunked(s, each ? s.size : 0);
  const unsigned blocks = blocks_for(numel, chunked ? kThreads * kChunk : kThreads);
  if (chunked) {
    (each ? linf_kernel<X, G, kChunk, true> : linf_kernel<X, G, kChunk, false>)<<<blocks, kThreads, 0, stream>>>(s);
  } else {
    (each ? linf_kernel<X, G, 1, true> : linf_kernel<X, G, 1, false>)<<<blocks, kThreads, 0, stream>>>(s);
  }
  check_launch("pgd_step (linf)");
}

template <class X, class G, int C, bool resident>
__global__ void __launch_bounds__(kMostThreads) l2_kernel(const StepArguments s) {
  __shared__ float scratch[2][kWarp];
  const int64_t n = blockIdx.x;
  const Sample<X, G, C, resident> sample(s, n);

  float sum = 0;
  sample.each([&](const Chunk<C>& c) {
#pragma unroll
    for (int k = 0; k < C; ++k) {
      sum += c.gradient[k] * c.gradient[k];
    }
  });
  const float a = s.step_sizes ? s.step_sizes[n] : s.step_size;
  const float scale = a / (sqrtf(sum_block(sum, scratch[0])) + 1e-12f);

  sum = 0;
  sample.each([&](const Chunk<C>& c) {
#pragma unroll
    for (int k = 0; k < C; ++k) {
      const float delta = c.x[k] + c.gradient[k] * scale - c.origin[k];
      sum += delta * delta;
    }
  });
  const float distance = sqrtf(sum_block(sum, scratch[1]));
  const bool within = distance <= s.epsilon;
  const float shrink = s.epsilon / distance;
  sample.write_each([&](float x, float origin, float g) {
    const float t = x + g * scale;
    return within ? clamped(t, s.lower, s.upper) : l2_project(t, origin, shrink, s.lower, s.upper);
  });
}

template <class X, class G>
void launch_l2(const StepArguments& s, cudaStream_t stream) {
  const unsigned blocks = blocks_for(s.samples, 1);
  const unsigned chunks = threads_for<kChunk>(s, kMostThreads);
  if (!is_chunked(s, s.size)) {
    l2_kernel<X, G, 1, false><<<blocks, threads_for<1>(s, kMostThreads), 0, stream>>>(s);
  } else if (s.size <= kMostThreads * kChunk) {
    l2_kernel<X, G, kChunk, true><<<blocks, chunks, 0, stream>>>(s);
  } else {
    l2_kernel<X, G, kChunk, false><<<blocks, chunks, 0, stream>>>(s);
  }
  check_launch("pgd_step (l2)");
}

}  // namespace

void pgd_step_out(
    const Tensor& x, const Tensor& origin, const Tensor& gradient, double step_size, const OptionalTensor& step_sizes,
    double epsilon, std::string norm, double lower, double upper, int64_t count, const OptionalTensor& counts,
    const Tensor& out) {
  check_step(x, origin, gradient, step_sizes, norm, counts, out);
  if (x.numel() == 0) {
    return;
  }
  const OnDeviceOf device(x);
  const StepArguments s{
      x.const_data_ptr(),
      origin.const_data_ptr(),
      gradient.const_data_ptr(),
      out.mutable_data_ptr(),
      x.size(0),
      x.numel() / x.size(0),
      static_cast<float>(step_size),
      step_sizes ? static_cast<const float*>(step_sizes->const_data_ptr()) : nullptr,
      static_cast<float>(epsilon),
      static_cast<float>(lower),
      static_cast<float>(upper),
      count,
      counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr};
  if (norm == "l1") {
    launch_l1(x, gradient, s, device.stream());
    return;
  }
  by_dtypes(x, gradient, [&](auto* px, auto* pg) {
    using X = std::remove_pointer_t<decltype(px)>;
    using G = std::remove_pointer_t<decltype(pg)>;
    norm == "linf" ? launch_linf<X, G>(s, device.stream()) : launch_l2<X, G>(s, device.stream());
  });
}

Tensor pgd_step(
    const Tensor& x, const Tensor& origin, const Tensor& gradient, double step_size, const OptionalTensor& step_sizes,
    double epsilon, std::string norm, double lower, double upper, int64_t count, const OptionalTensor& counts) {
  Tensor out = torch::stable::empty_like(x);
  pgd_step_out(x, origin, gradient, step_size, step_sizes, epsilon, norm, lower, upper, count, counts, out);
  return out;
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("pgd_step", TORCH_BOX(&emr::cuda::pgd_step));
  m.impl("pgd_step_out", TORCH_BOX(&emr::cuda::pgd_step_out));
}
