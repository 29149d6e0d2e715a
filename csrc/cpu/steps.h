// The interface between sq_norms and pgd_step and their kernels, one set for each instruction set and dtype.
#pragma once

#include "kernels.h"

namespace emr {

// The sum of squares over [begin, end), which is to be at most a block long.
using SquareSum = double (*)(const void* values, int64_t begin, int64_t end);

// x, origin and out have one dtype; the gradient may have a narrower one.
struct Step {
  const void* x;
  const void* origin;
  const void* gradient;
  void* out;  // may be x
  double epsilon;
  double lower;
  double upper;
};

// Kernels take ranges of elements inside one sample. Scratch is of the compute type, and whole units long.
struct StepKernels {
  void (*linf)(const Step&, double step_size, int64_t begin, int64_t end);
  // With t = x + scale * g: the sum of (t - origin)² over at most a block; the projection, or t itself if shrink is 1.
  double (*l2_squares)(const Step&, double scale, int64_t begin, int64_t end);
  void (*l2)(const Step&, double scale, double shrink, int64_t begin, int64_t end);
  // Writes |g| to scratch; returns how many are NaN.
  double (*magnitudes)(const Step&, void* scratch, int64_t begin, int64_t end);
  // How many values of the scratch exceed a bound.
  double (*count_above)(const void* scratch, int64_t size, double bound);
  // With t the step on coordinates of |g| >= least: |t - origin| and its room to scratch; returns how many are NaN.
  double (*distances)(const Step&, double a, double least, void* distance, void* room, int64_t begin, int64_t end);
  // The sum of the distances, cut and bounded by their rooms.
  double (*excess)(const void* distance, const void* room, int64_t size, double cut);
  // The projection with that cut, or t itself if the cut is 0.
  void (*l1)(const Step&, double a, double least, double cut, int64_t begin, int64_t end);
};

}  // namespace emr
