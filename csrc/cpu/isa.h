// Which instruction sets the CPU kernels are compiled for, and which one this processor gets.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

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
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

// The best the processor has, or a lower one that EMR_CPU_ISA names; throws for a name that is none of these.
inline Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("EMR_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (int i = 0; i <= static_cast<int>(best); ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) == 0) {
      return static_cast<Isa>(i);
    }
  }
  // No std::string: what it instantiates would be compiled for AVX in the files that are, and shared with the others.
  char message[200];
  std::snprintf(
      message, sizeof message, "EMR_CPU_ISA is '%.40s'; expected %s, any set up to this processor's %s, or unset", wanted,
      kIsaNames[0], kIsaNames[static_cast<int>(best)]);
  throw std::runtime_error(message);
}

}  // namespace emr
