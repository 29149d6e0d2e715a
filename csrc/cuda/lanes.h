// Loads and stores of 16 bytes, and division by an invariant. Host and device: tests run kernels' bodies on the CPU.
#pragma once

#include "../formulas.h"

namespace emr::cuda {

// Elements of 16 bytes, in float32.
template <class T>
inline constexpr int kLanes = 16 / sizeof(T);

template <class T>
struct Lanes {
  float v[kLanes<T>];
};

template <class T>
struct alignas(16) Packed {
  T v[kLanes<T>];
};

// kLanes elements from p on, which `aligned` says is a multiple of 16 bytes.
template <class T, bool aligned>
EMR_HOST_DEVICE inline Lanes<T> load_lanes(const T* p) {
  Packed<T> packed;
  if constexpr (aligned) {
    packed = *reinterpret_cast<const Packed<T>*>(p);
  } else {
    for (int i = 0; i < kLanes<T>; ++i) {
      packed.v[i] = p[i];
    }
  }
  Lanes<T> r;
  for (int i = 0; i < kLanes<T>; ++i) {
    r.v[i] = to_float(packed.v[i]);
  }
  return r;
}

template <class T, bool aligned>
EMR_HOST_DEVICE inline void store_lanes(T* p, const Lanes<T>& x) {
  Packed<T> packed;
  for (int i = 0; i < kLanes<T>; ++i) {
    round_to(packed.v[i], x.v[i]);
  }
  if constexpr (aligned) {
    *reinterpret_cast<Packed<T>*>(p) = packed;
  } else {
    for (int i = 0; i < kLanes<T>; ++i) {
      p[i] = packed.v[i];
    }
  }
}

// The first `count` of the lanes; the others are 0.
template <class T>
EMR_HOST_DEVICE inline Lanes<T> load_some(const T* p, int count) {
  Lanes<T> r;
  for (int i = 0; i < kLanes<T>; ++i) {
    r.v[i] = i < count ? to_float(p[i]) : 0.0f;
  }
  return r;
}

template <class T>
EMR_HOST_DEVICE inline void store_some(T* p, const Lanes<T>& x, int count) {
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i < count) {
      round_to(p[i], x.v[i]);
    }
  }
}

// Whether 16-byte accesses are allowed from here on.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// n / d for n < 2^31 and 0 < d < 2^31 by a multiplication: Granlund and Montgomery's invariant division (PLDI 1994).
struct Divider {
  uint32_t d, magic, shift;

  Divider() = default;
  explicit Divider(uint32_t divisor) : d(divisor), shift(0) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  EMR_HOST_DEVICE uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, magic);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32);
#endif
    return (high + n) >> shift;
  }
};

}  // namespace emr::cuda
