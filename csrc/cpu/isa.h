// Which instruction sets the CPU kernels are compiled for, and which one this processor gets.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define EMR_X86 1
#else
#define EMR_X86 0
#endif

namespace emr {

enum class Isa { baseline, avx2, avx512 };

#if EMR_X86
inline constexpr const char* kIsaNames[] = {"sse2", "avx2", "avx512"};
inline constexpr int kIsaCount = 3;
#else
inline constexpr const char* kIsaNames[] = {"baseline"};
inline constexpr int kIsaCount = 1;
#endif

inline Isa best_isa() {
#if EMR_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// The best the processor has, or a lower one that EMR_CPU_ISA names.
inline Isa chosen_isa() {
  const Isa best = best_isa();
  if (const char* wanted = std::getenv("EMR_CPU_ISA")) {
    for (int i = 0; i < kIsaCount; ++i) {
      if (std::strcmp(wanted, kIsaNames[i]) == 0 && i <= static_cast<int>(best)) {
        return static_cast<Isa>(i);
      }
    }
  }
  return best;
}

}  // namespace emr
