// The body of pack_bits for one thread. Host and device: a test runs it on the CPU.
#pragma once

#include "lanes.h"

namespace emr::cuda {

// Elements that one thread packs, into two bytes.
inline constexpr int kPackedByThread = 16;

// Eight bytes of 0 or 1 to one byte of bits: bit 0 of byte k moves to bit 56 + k, and no two partial products meet.
EMR_HOST_DEVICE inline uint8_t pack_eight(uint64_t eight) {
  return static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
}

// `target` is a multiple of two bytes, and `source` of 16 where `aligned`.
template <bool aligned>
EMR_HOST_DEVICE inline void pack_bits_thread(const uint8_t* source, uint8_t* target, int64_t numel, int64_t thread) {
  const int64_t begin = thread * kPackedByThread;
  if (begin >= numel) {
    return;
  }
  struct alignas(16) Two {
    uint64_t eight[2];
  };
  Two in{};
  if (aligned && begin + kPackedByThread <= numel) {
    in = *reinterpret_cast<const Two*>(source + begin);
  } else {
    for (int i = 0; i < kPackedByThread; ++i) {
      if (begin + i < numel) {
        in.eight[i >> 3] |= static_cast<uint64_t>(source[begin + i]) << (8 * (i & 7));
      }
    }
  }
  const uint8_t low = pack_eight(in.eight[0]), high = pack_eight(in.eight[1]);
  uint8_t* out = target + (begin >> 3);
  if (begin + 8 < numel) {
    *reinterpret_cast<uint16_t*>(out) = static_cast<uint16_t>(low | high << 8);
  } else {
    *out = low;
  }
}

}  // namespace emr::cuda
