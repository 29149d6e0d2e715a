// The interface between logit_seeds and robust_losses and their kernels, one set for each instruction set and dtype.
#pragma once

#include "../row_formulas.h"
#include "kernels.h"

namespace emr {

// Pointers are to the logits' dtype T or to the compute type A; null where there is none.
struct SeedTask {
  const void* logits;     // T [N, C]
  const int64_t* label;   // [N]
  const int64_t* target;  // [N]
  void* seed;             // T [N, C]
  void* loss;             // A [N], as the two margins
  void* margin;
  void* probability_margin;
  int64_t* runner_up;
  int64_t classes;
  rows::SeedKind kind;
  double temperature;
  bool center;
};

struct LossTask {
  const void* adversarial;  // T [N, C]
  const void* clean;        // T [N, C]
  const int64_t* label;     // [N]
  const void* weight;       // A [N]
  void* loss;               // A [N]
  void* adversarial_grad;   // A [N, C]
  void* clean_grad;         // A [N, C]
  rows::LossOptions options;
};

// Up to this many classes, rows are worked on side by side, one in each lane; wider ones a unit of classes at a time.
inline constexpr int64_t kStackedClasses = 128;

// Scratch that a kernel needs, in values of the compute type: so many tables of one unit for each step over the classes.
inline int64_t row_scratch(int64_t classes) {
  constexpr int64_t kTables = 5;
  return kTables * kUnit * (classes <= kStackedClasses ? classes : (classes + kUnit - 1) / kUnit);
}

// Kernels take ranges of rows, and scratch of `row_scratch` values, aligned to 64 bytes.
struct RowKernels {
  void (*seeds)(const SeedTask&, int64_t begin, int64_t end, void* scratch);
  void (*losses)(const LossTask&, int64_t begin, int64_t end, void* scratch);
};

}  // namespace emr
