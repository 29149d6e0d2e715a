// Philox4x32-10, and the random numbers of pgd_start made from its words. The Python reference, which is checked against
// the generator's published vectors, is emr_kernels/ops/_philox.py.
#pragma once

#include <math.h>

#include <cstdint>

#include "formulas.h"

namespace emr {

struct Words {
  uint32_t w[4];
};

EMR_HOST_DEVICE static inline Words philox(Words c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = uint64_t{0xD2511F53} * c.w[0];
    const uint64_t q = uint64_t{0xCD9E8D57} * c.w[2];
    c = {
        {static_cast<uint32_t>(q >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(q),
         static_cast<uint32_t>(p >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(p)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return c;
}

// Stream 0 serves the elements, stream 1 what a sample draws once.
struct Random {
  uint64_t seed;
  uint64_t offset;

  EMR_HOST_DEVICE inline Words words(uint64_t block, uint32_t stream) const {
    return philox(
        {{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32) | stream << 31}},
        static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }
};

EMR_HOST_DEVICE static inline float log_of(float x) { return logf(x); }
EMR_HOST_DEVICE static inline double log_of(double x) { return log(x); }
EMR_HOST_DEVICE static inline float root_of(float x) { return sqrtf(x); }
EMR_HOST_DEVICE static inline double root_of(double x) { return sqrt(x); }
EMR_HOST_DEVICE static inline float power_of(float x, float y) { return powf(x, y); }
EMR_HOST_DEVICE static inline double power_of(double x, double y) { return pow(x, y); }
// Of so many full turns.
EMR_HOST_DEVICE static inline void sine_and_cosine(float turns, float& sine, float& cosine) {
#if defined(__CUDA_ARCH__)
  sincospif(2 * turns, &sine, &cosine);
#else
  sine = sinf(turns * 6.2831853f);
  cosine = cosf(turns * 6.2831853f);
#endif
}
EMR_HOST_DEVICE static inline void sine_and_cosine(double turns, double& sine, double& cosine) {
  sine = sin(turns * 6.283185307179586);
  cosine = cos(turns * 6.283185307179586);
}

// (0, 1], in steps of 2**-24.
template <class A>
EMR_HOST_DEVICE static inline A unit_uniform(uint32_t word) {
  return static_cast<A>((word >> 8) + 1) * A(0x1p-24);
}

// [-1, 1), in steps of 2**-23; exact, so that rounding cannot differ.
template <class A>
EMR_HOST_DEVICE static inline A signed_uniform(uint32_t word) {
  return static_cast<A>(word >> 8) * A(0x1p-23) - A(1);
}

// Four standard normal numbers by Box and Muller.
template <class A>
EMR_HOST_DEVICE static inline void gaussians(const Words& c, A (&z)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    const A radius = root_of(A(-2) * log_of(unit_uniform<A>(c.w[pair])));
    A sine, cosine;
    sine_and_cosine(static_cast<A>(c.w[pair + 1] >> 8) * A(0x1p-24), sine, cosine);
    z[pair] = radius * cosine;
    z[pair + 1] = radius * sine;
  }
}

// Four numbers of Laplace's distribution: an exponential one, and a sign from the lowest bit.
template <class A>
EMR_HOST_DEVICE static inline void laplacians(const Words& c, A (&z)[4]) {
  for (int i = 0; i < 4; ++i) {
    const A e = -log_of(unit_uniform<A>(c.w[i]));
    z[i] = c.w[i] & 1 ? -e : e;
  }
}

}  // namespace emr
