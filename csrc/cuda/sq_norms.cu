// sq_norms on a GPU: one block for each sample of each tensor.
#include <vector>

#include "../samples.h"
#include "launch.cuh"

namespace emr::cuda {
namespace {

// Tensors of one launch; their descriptions travel among the kernel's arguments, which may have 4096 bytes.
constexpr int kTensors = 64;
constexpr int kMostThreads = 1024;

struct Sources {
  const void* data[kTensors];
  int64_t stride[kTensors];  // elements from sample to sample
  int64_t size[kTensors];    // elements of a sample
  ScalarType type[kTensors];
};

// This thread's share of a sample's squares, in four partial sums that need not wait for one another.
template <class T>
__device__ float squares_of(const T* p, int64_t size) {
  float sums[4] = {};
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    const int64_t vectors = size / kLanes<T>;
    for (int64_t v = threadIdx.x; v < vectors; v += 4 * blockDim.x) {
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int64_t at = v + u * static_cast<int64_t>(blockDim.x);
        if (at < vectors) {
          const Lanes<T> x = load_lanes<T, true>(p + at * kLanes<T>);
#pragma unroll
          for (int i = 0; i < kLanes<T>; ++i) {
            sums[u] += x.v[i] * x.v[i];
          }
        }
      }
    }
    done = vectors * kLanes<T>;
  }
  for (int64_t i = done + threadIdx.x; i < size; i += blockDim.x) {
    const float x = to_float(p[i]);
    sums[0] += x * x;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ double squares_of(const double* p, int64_t size) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
    sum += p[i] * p[i];
  }
  return sum;
}

template <class T, class A, class R>
__device__ void sum_of_sample(const void* data, int64_t offset, int64_t size, A* scratch, R* result) {
  const A sum = sum_block(squares_of(static_cast<const T*>(data) + offset, size), scratch);
  if (threadIdx.x == 0) {
    *result = static_cast<R>(sum);
  }
}

template <class R>
__global__ void __launch_bounds__(kMostThreads, 1) sq_norms_kernel(const Sources sources, R* result) {
  __shared__ double wide[kWarp];
  __shared__ float narrow[kWarp];
  const int row = blockIdx.y;
  const int64_t n = blockIdx.x;
  const int64_t offset = n * sources.stride[row], size = sources.size[row];
  R* const target = result + row * static_cast<int64_t>(gridDim.x) + n;
  switch (sources.type[row]) {
    case ScalarType::Float:
      return sum_of_sample<float>(sources.data[row], offset, size, narrow, target);
    case ScalarType::BFloat16:
      return sum_of_sample<bf16>(sources.data[row], offset, size, narrow, target);
    case ScalarType::Half:
      return sum_of_sample<fp16>(sources.data[row], offset, size, narrow, target);
    default:
      return sum_of_sample<double>(sources.data[row], offset, size, wide, target);
  }
}

bool is_served(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

template <class R>
void launch(const std::vector<Tensor>& tensors, int64_t batch, R* result, cudaStream_t stream) {
  const auto count = static_cast<int64_t>(tensors.size());
  for (int64_t first = 0; first < count; first += kTensors) {
    const int64_t rows = std::min<int64_t>(kTensors, count - first);
    Sources sources{};
    int64_t largest = 1;
    for (int64_t r = 0; r < rows; ++r) {
      const Tensor& t = tensors[first + r];
      sources.data[r] = t.const_data_ptr();
      sources.stride[r] = t.stride(0);
      sources.size[r] = t.numel() / batch;
      sources.type[r] = t.scalar_type();
      largest = std::max(largest, sources.size[r]);
    }
    const int64_t threads = std::min<int64_t>(kMostThreads, divide_up(divide_up(largest, 4), kWarp) * kWarp);
    const dim3 grid(blocks_for(batch, 1), static_cast<unsigned>(rows));
    sq_norms_kernel<R><<<grid, static_cast<unsigned>(threads), 0, stream>>>(sources, result + first * batch);
    check_launch("sq_norms");
  }
}

}  // namespace

Tensor sq_norms(std::vector<Tensor> tensors) {
  STD_TORCH_CHECK(!tensors.empty() && tensors[0].dim() >= 1, "expected at least one tensor [N, ...]");
  const int64_t batch = tensors[0].size(0);
  bool wide = false;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.dim() >= 1 && t.size(0) == batch, "expected tensors [N, ...] of one N");
    STD_TORCH_CHECK(t.get_device_index() == tensors[0].get_device_index(), "expected tensors on one device");
    STD_TORCH_CHECK(dense_samples(t), "expected tensors whose samples are dense");
    STD_TORCH_CHECK(is_served(t.scalar_type()), "expected float32, float64, bfloat16 or float16");
    wide = wide || t.scalar_type() == ScalarType::Double;
  }
  const OnDeviceOf device(tensors[0]);
  const auto rows = static_cast<int64_t>(tensors.size());
  Tensor result = torch::stable::new_empty(tensors[0], {rows, batch}, wide ? ScalarType::Double : ScalarType::Float);
  if (batch > 0) {
    if (wide) {
      launch(tensors, batch, static_cast<double*>(result.mutable_data_ptr()), device.stream());
    } else {
      launch(tensors, batch, static_cast<float*>(result.mutable_data_ptr()), device.stream());
    }
  }
  return result;
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("sq_norms", TORCH_BOX(&emr::cuda::sq_norms));
}
