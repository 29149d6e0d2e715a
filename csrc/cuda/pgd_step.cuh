// What the kernels of pgd_step share: their arguments, and how a block reads its sample.
#pragma once

#include "launch.cuh"

#define EMR_FORMULA __device__ __forceinline__

namespace emr::cuda {

#include "../pgd_step.inc"

// Elements that a thread handles together: one or two 16-byte loads of each tensor.
inline constexpr int kChunk = 8;

struct StepArguments {
  const void* x;
  const void* origin;
  const void* gradient;
  void* out;  // may be x
  int64_t samples;
  int64_t size;  // elements of a sample
  float step_size;
  const float* step_sizes;  // null: step_size for all
  float epsilon;
  float lower;
  float upper;
  int64_t count;
  const int64_t* counts;  // null: count for all
};

template <class T, int C>
__device__ __forceinline__ void load_chunk(const T* p, float (&v)[C]) {
  if constexpr (C == 1) {
    v[0] = to_float(*p);
  } else {
#pragma unroll
    for (int k = 0; k < C; k += kLanes<T>) {
      const Lanes<T> lanes = load_lanes<T, true>(p + k);
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        v[k + i] = lanes.v[i];
      }
    }
  }
}

template <class T, int C>
__device__ __forceinline__ void store_chunk(T* p, const float (&v)[C]) {
  if constexpr (C == 1) {
    round_to(*p, v[0]);
  } else {
#pragma unroll
    for (int k = 0; k < C; k += kLanes<T>) {
      Lanes<T> lanes;
#pragma unroll
      for (int i = 0; i < kLanes<T>; ++i) {
        lanes.v[i] = v[k + i];
      }
      store_lanes<T, true>(p + k, lanes);
    }
  }
}

// What a step reads at one chunk.
template <int C>
struct Chunk {
  float x[C];
  float origin[C];
  float gradient[C];
};

// A thread's chunks of the sample that its block works on. Resident: one chunk, kept in registers from the start on;
// else the sample is read anew, from the caches mostly, at every pass.
template <class X, class G, int C, bool resident>
class Sample {
 public:
  __device__ __forceinline__ Sample(const StepArguments& s, int64_t n)
      : x_(static_cast<const X*>(s.x) + n * s.size),
        origin_(static_cast<const X*>(s.origin) + n * s.size),
        gradient_(static_cast<const G*>(s.gradient) + n * s.size),
        out_(static_cast<X*>(s.out) + n * s.size),
        size_(s.size),
        first_(static_cast<int64_t>(threadIdx.x) * C) {
    if constexpr (resident) {
      if (first_ < size_) {
        kept_ = read(first_);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) const {
    if constexpr (resident) {
      if (first_ < size_) {
        f(kept_);
      }
    } else {
      for (int64_t i = first_; i < size_; i += static_cast<int64_t>(blockDim.x) * C) {
        f(read(i));
      }
    }
  }

  // Writes what f makes of each element.
  template <class F>
  __device__ __forceinline__ void write_each(const F& f) const {
    for (int64_t i = first_; i < size_; i += static_cast<int64_t>(blockDim.x) * C) {
      const Chunk<C> c = resident ? kept_ : read(i);
      float t[C];
#pragma unroll
      for (int k = 0; k < C; ++k) {
        t[k] = f(c.x[k], c.origin[k], c.gradient[k]);
      }
      store_chunk(out_ + i, t);
    }
  }

 private:
  __device__ __forceinline__ Chunk<C> read(int64_t i) const {
    Chunk<C> c;
    load_chunk(x_ + i, c.x);
    load_chunk(origin_ + i, c.origin);
    load_chunk(gradient_ + i, c.gradient);
    return c;
  }

  const X* x_;
  const X* origin_;
  const G* gradient_;
  X* out_;
  int64_t size_;
  int64_t first_;
  Chunk<C> kept_;
};

// Whether chunks of kChunk, in samples of a size, start at multiples of 16 bytes.
inline bool is_chunked(const StepArguments& s, int64_t size) {
  return is_aligned(s.x) && is_aligned(s.origin) && is_aligned(s.gradient) && is_aligned(s.out) && size % kChunk == 0;
}

// Threads that share a sample, each with chunks of C elements.
template <int C>
unsigned threads_for(const StepArguments& s, int most) {
  return static_cast<unsigned>(std::min<int64_t>(most, divide_up(divide_up(s.size, C), kWarp) * kWarp));
}

// Calls f with null pointers to the dtypes of x and of the gradient.
template <class F>
void by_dtypes(const Tensor& x, const Tensor& gradient, const F& f) {
  by_dtype(x, [&](auto* px) {
    if (x.scalar_type() == gradient.scalar_type()) {
      f(px, px);
    } else if constexpr (std::is_same_v<decltype(px), float*>) {
      if (gradient.scalar_type() == ScalarType::BFloat16) {
        f(px, static_cast<bf16*>(nullptr));
      } else {
        f(px, static_cast<fp16*>(nullptr));
      }
    }
  });
}

// In pgd_step_l1.cu.
void launch_l1(const Tensor& x, const Tensor& gradient, const StepArguments& s, cudaStream_t stream);

}  // namespace emr::cuda
