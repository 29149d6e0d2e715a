// From a dense tensor's sizes and strides to the geometry its kernels walk.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "../layout.h"
#include "kernels.h"

namespace emr::cpu {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::fp16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

template <class T>
compute_t<T> widened(T x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return to_float(x);
  }
}

template <class T>
T narrowed(compute_t<T> x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return rounded<T>(x);
  }
}

// For a tensor that is not empty. `per_channel`: whether any coefficient or sum depends on the channel.
inline Geometry geometry_of(const Tensor& t, bool per_channel) {
  const int64_t numel = t.numel();
  Geometry g{false, numel, numel, 1, 0};
  const bool channels_last = channels_last_order(t);
  if (!per_channel) {
    return g;
  }
  STD_TORCH_CHECK(t.dim() >= 2, "expected [N, C, ...]");
  const int64_t channels = t.size(1);
  if (channels == 1) {
    return g;
  }
  const int64_t inner = channels_last ? 1 : numel / (t.size(0) * channels);
  g.channels = channels;
  g.row = inner;
  // Short rows: one table over a whole sample (or pixel) beats changing coefficients every few vectors.
  constexpr int64_t kShortRow = 64;
  if (inner < kShortRow) {
    constexpr int64_t kMinPeriod = 256;
    const int64_t sample = channels * inner;
    const int64_t aligned = sample * (kUnit / std::gcd(sample, kUnit));
    g.periodic = true;
    g.period = aligned * ((kMinPeriod + aligned - 1) / aligned);
  }
  return g;
}

// Coefficients as the kernels want them: [channels], or a table over one period.
template <class A>
class Coefficients {
 public:
  Coefficients(const Geometry& g, const OptionalTensor& vector, A otherwise) {
    constexpr ScalarType type = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    if (vector) {
      STD_TORCH_CHECK(
          vector->scalar_type() == type && vector->is_contiguous() && vector->numel() == g.channels,
          "expected one contiguous coefficient of the compute type for each channel");
    }
    const A* source = vector ? static_cast<const A*>(vector->const_data_ptr()) : nullptr;
    if (source != nullptr && !g.periodic) {
      data_ = source;
      return;
    }
    const int64_t size = g.periodic ? std::min(g.period, (g.numel + kUnit - 1) / kUnit * kUnit) : g.channels;
    owned_.reset(new A[size]);
    data_ = owned_.get();
    if (source == nullptr) {
      std::fill_n(owned_.get(), size, otherwise);
      return;
    }
    const int64_t sample = g.channels * g.row;
    const int64_t first = std::min(size, sample);
    for (int64_t i = 0, c = 0; i < first; ++c) {
      const int64_t end = std::min(first, i + g.row);
      std::fill(owned_.get() + i, owned_.get() + end, source[c]);
      i = end;
    }
    for (int64_t i = sample; i < size; i += sample) {
      std::copy_n(owned_.get(), std::min(sample, size - i), owned_.get() + i);
    }
  }
  const A* data() const { return data_; }

 private:
  std::unique_ptr<A[]> owned_;
  const A* data_ = nullptr;
};

// Memory for `size` values, aligned to the longest vector and not initialised.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<A*>(::operator new(size * sizeof(A), kAlignment))) {}
  A* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<A, Free> data_;
};

// Calls f(begin, end) on ranges of whole blocks, in parallel.
template <class F>
void over_blocks(int64_t numel, const F& f) {
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, 2, [&](int64_t begin, int64_t end) {
    f(begin * kBlock, std::min(end * kBlock, numel));
  });
}

}  // namespace emr::cpu
