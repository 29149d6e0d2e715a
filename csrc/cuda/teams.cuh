// Teams of threads for rows of logits; see rows.h.
#pragma once

#include "launch.cuh"
#include "rows.h"

namespace emr::cuda {

__device__ inline int64_t max_lanes(int64_t x, int width) {
  for (int step = width / 2; step > 0; step /= 2) {
    const int64_t other = __shfl_xor_sync(0xffffffffu, x, step, kWarp);
    x = other > x ? other : x;
  }
  return x;
}

// `width` neighbouring lanes, a power of two. All lanes of the warp take part.
struct LaneTeam {
  int width;

  __device__ int rank() const { return threadIdx.x % width; }
  __device__ int size() const { return width; }
  __device__ float sum(float x) const { return sum_lanes(x, width); }
  __device__ int64_t max(int64_t x) const { return max_lanes(x, width); }
};

// A block. `scratch`: kWarp shared values of 8 bytes.
struct BlockTeam {
  int64_t* scratch;

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ float sum(float x) const {
    __syncthreads();
    return sum_block(x, reinterpret_cast<float*>(scratch));
  }
  __device__ int64_t max(int64_t x) const {
    x = max_lanes(x, kWarp);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
      scratch[threadIdx.x / kWarp] = x;
    }
    __syncthreads();
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
      x = scratch[w] > x ? scratch[w] : x;
    }
    return x;
  }
};

// The row of a team of lanes. Teams beyond the last row work on it too, for whole warps exchange values.
struct TeamRow {
  int64_t n;
  bool active;

  __device__ TeamRow(int width, int64_t rows) {
    const int64_t team = static_cast<int64_t>(blockIdx.x) * (kThreads / width) + threadIdx.x / width;
    active = team < rows;
    n = active ? team : rows - 1;
  }
};

}  // namespace emr::cuda
