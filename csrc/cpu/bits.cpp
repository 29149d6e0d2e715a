// pack_bits on the CPU.
#include <bit>
#include <cstring>

#include "layout.h"

namespace emr::cpu {
namespace {

// Eight bytes of 0 or 1 to a byte of bits: bit 0 of byte k moves to bit 56 + k, and no two partial products meet.
uint8_t pack_eight(uint64_t eight) {
  static_assert(std::endian::native == std::endian::little);
  return static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
}

}  // namespace

Tensor pack_bits(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "expected a bool tensor");
  channels_last_order(mask);
  const int64_t numel = mask.numel();
  Tensor bits = new_bits(mask);
  const auto* source = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto* target = static_cast<uint8_t*>(bits.mutable_data_ptr());
  over_blocks(numel, [=](int64_t begin, int64_t end) {
    uint64_t eight;
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      std::memcpy(&eight, source + i, sizeof eight);
      target[i >> 3] = pack_eight(eight);
    }
    if (i < end) {
      eight = 0;
      std::memcpy(&eight, source + i, static_cast<size_t>(end - i));
      target[i >> 3] = pack_eight(eight);
    }
  });
  return bits;
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&emr::cpu::pack_bits));
}
