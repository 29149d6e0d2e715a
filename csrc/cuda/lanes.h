// Loads and stores of 16 bytes, and division by an invariant. Host and device: tests run kernels' bodies on the CPU.
#pragma once

#include "../formulas.h"

// For loops over arrays that shall stay in registers.
#if defined(__CUDA_ARCH__)
#define EMR_UNROLL _Pragma("unroll")
#define EMR_PRAGMA(text) _Pragma(#text)
#define EMR_UNROLL_TIMES(n) EMR_PRAGMA(unroll (n))
#else
#define EMR_UNROLL
#define EMR_UNROLL_TIMES(n)
#endif

namespace emr::cuda {

// Threads of a block, at most; see launch.cuh.
inline constexpr int kThreads = 256;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of 16 bytes.
template <class T>
inline constexpr int kLanes = 16 / sizeof(T);

// The elements as they lie in memory. Where results may overwrite an argument, load all that is in flight into these
// before the first store: the compiler must not move a load across one.
template <class T>
struct alignas(16) Packed {
  T v[kLanes<T>];
};

// The elements in float32.
template <class T>
struct Lanes {
  float v[kLanes<T>];
};

// kLanes elements from p on, which is a multiple of 16 bytes.
template <class T>
EMR_HOST_DEVICE inline Packed<T> load_packed(const T* p) {
  return *reinterpret_cast<const Packed<T>*>(p);
}

// `count` elements from any p on, one by one; the others are 0.
template <class T>
EMR_HOST_DEVICE inline Packed<T> load_packed(const T* p, int count) {
  Packed<T> r{};
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    if (i < count) {
      r.v[i] = p[i];
    }
  }
  return r;
}

template <class T>
EMR_HOST_DEVICE inline void store_packed(T* p, const Packed<T>& x) {
  *reinterpret_cast<Packed<T>*>(p) = x;
}

template <class T>
EMR_HOST_DEVICE inline void store_packed(T* p, const Packed<T>& x, int count) {
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    if (i < count) {
      p[i] = x.v[i];
    }
  }
}

template <class T>
EMR_HOST_DEVICE inline Lanes<T> widened(const Packed<T>& x) {
  Lanes<T> r;
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    r.v[i] = to_float(x.v[i]);
  }
  return r;
}

template <class T>
EMR_HOST_DEVICE inline Packed<T> narrowed(const Lanes<T>& x) {
  Packed<T> r;
  EMR_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    round_to(r.v[i], x.v[i]);
  }
  return r;
}

// As load_packed and store_packed, in float32. `aligned` chooses between the two ways of each.
template <class T, bool aligned>
EMR_HOST_DEVICE inline Lanes<T> load_lanes(const T* p) {
  return widened(aligned ? load_packed(p) : load_packed(p, kLanes<T>));
}

template <class T, bool aligned>
EMR_HOST_DEVICE inline void store_lanes(T* p, const Lanes<T>& x) {
  aligned ? store_packed(p, narrowed<T>(x)) : store_packed(p, narrowed<T>(x), kLanes<T>);
}

template <class T>
EMR_HOST_DEVICE inline Lanes<T> load_some(const T* p, int count) {
  return widened(load_packed(p, count));
}

template <class T>
EMR_HOST_DEVICE inline void store_some(T* p, const Lanes<T>& x, int count) {
  store_packed(p, narrowed<T>(x), count);
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
