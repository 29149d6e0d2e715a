// The interface between the operators and their kernels, one set for each instruction set and dtype.
#pragma once

#include <cstdint>

#include "../formulas.h"
#include "isa.h"

namespace emr {

// float32 arithmetic for everything but float64.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename compute<T>::type;

// Elements handled together: whole bytes of bits, and a whole number of vectors in every instruction set.
inline constexpr int64_t kUnit = 16;
// Elements that one task covers. Fixed, so that sums do not depend on the number of threads.
inline constexpr int64_t kBlock = 16384;

// How the channel of an element follows from its place in memory.
//   rows:     `row` consecutive elements share a channel (row >= kUnit, or a single row).
//   periodic: coefficients are tables over `period` elements (a multiple of kUnit) that repeat.
struct Geometry {
  bool periodic;
  int64_t numel;
  int64_t row;
  int64_t channels;
  int64_t period;
};

// y = leaky(a * scale + shift + skip) and its bits. Pointers to coefficients are to the compute type:
// [channels] for rows, [period] for periodic.
struct Forward {
  Geometry geometry;
  const void* a;
  const void* skip;  // null: none
  void* y;
  uint8_t* bits;
  const void* scale;
  const void* shift;
  double slope;
};

// out = in * slope(bits) * scale + skip; with `delta` (and no skip) also sums of delta * slope(bits) * in.
struct Backward {
  Geometry geometry;
  const void* in;
  const void* delta;  // null: no sums
  const void* skip;   // null: none
  void* out;
  const uint8_t* bits;
  const void* scale;
  double slope;
};

struct Kernels {
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  void (*backward)(const Backward&, int64_t begin, int64_t end);
  // The sums are added to `sums`: rows: one for each row that [begin, end) meets; periodic: a table of one period.
  void (*backward_sums)(const Backward&, int64_t begin, int64_t end, void* sums);
};

enum class Dtype { f32, f64, bf16, fp16 };

}  // namespace emr
