// bfloat16 as numbers, one at a time.
#pragma once
#include <cstdint>

namespace slip {

// Of internal linkage: units that are compiled for different instruction sets must not share code.
namespace {

inline float bf16_to_float(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

// The nearest, of two the even one.
inline uint16_t bf16_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

}  // namespace slip
