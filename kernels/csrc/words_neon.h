// 16 words of 32 bits, in which quantised weights come (packed.h), as four NEON registers; with dot products where there are.
#pragma once
#include <cstring>

#include "vec_neon.h"

namespace slip::SLIP_ISA {

// Rows of a tile at most: for each row there are four accumulators among the 32 registers.
constexpr int kExactRows = 4, kInt8Rows = 4, kInt16Rows = 2;

struct words {
  int32x4_t q[4];
};

template <class F>
[[gnu::always_inline]] inline words each_word(const F& f) { return {{f(0), f(1), f(2), f(3)}}; }

inline void keep(words& a) { asm volatile("" : "+w"(a.q[0]), "+w"(a.q[1]), "+w"(a.q[2]), "+w"(a.q[3])); }
inline words load_words(const uint8_t* p) { return each_word([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(p + 16 * i)); }); }
inline words zero_words() { return each_word([](int) { return vdupq_n_s32(0); }); }
inline vec to_float(words w) { return each([&](int i) { return vcvtq_f32_s32(w.q[i]); }); }
inline vec halves16(const uint8_t* p) {
  return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
}
inline vec signed16(const uint8_t* p) {
  const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t lo = vmovl_s8(vget_low_s8(bytes)), hi = vmovl_high_s8(bytes);
  return to_float({{vmovl_s16(vget_low_s16(lo)), vmovl_high_s16(lo), vmovl_s16(vget_low_s16(hi)), vmovl_high_s16(hi)}});
}

// 16 whole numbers, -127 … 127, as bytes.
inline void narrow(int8_t* p, const vec& whole) {
  alignas(64) float lanes[16];
  vstore(lanes, vadd(whole, vset1(12582912.0f)));  // 1.5 * 2^23: now they stand in the low bits
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(__builtin_bit_cast(uint32_t, lanes[i]));
}

// Half byte I of each word, times 16^I; the last one as it is.
template <int I>
inline vec half_byte(words w) {
  if constexpr (I == 7)
    return each([&](int i) { return vcvtq_f32_u32(vshrq_n_u32(vreinterpretq_u32_s32(w.q[i]), 28)); });
  else
    return each([&](int i) { return vcvtq_f32_s32(vandq_s32(w.q[i], vdupq_n_s32(15 << (4 * I)))); });
}
// Byte I of each word, with its sign.
template <int I>
inline vec signed_byte(words w) {
  return each([&](int i) { return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(w.q[i], 24 - 8 * I), 24)); });
}

// Bytes of the low and high halves of bytes.
inline words low_halves(words w) {
  return each_word([&](int i) { return vandq_s32(w.q[i], vreinterpretq_s32_s8(vdupq_n_s8(15))); });
}
inline words high_halves(words w) {
  return each_word([&](int i) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(w.q[i]), 4)); });
}

// acc + the four bytes of each word, with signs, times four inputs.
using signed_words = words;
inline words signed_zero(const int32_t*) { return zero_words(); }
inline signed_words load_signed(const uint8_t* p) { return load_words(p); }
inline words dot_signed(words acc, const signed_words& w, const int8_t* x) {
  int32_t bits;
  std::memcpy(&bits, x, 4);
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(bits));
  return each_word([&](int i) {
    const int8x16_t bytes = vreinterpretq_s8_s32(w.q[i]);
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(acc.q[i], bytes, q);
#else
    const int16x8_t lo = vmull_s8(vget_low_s8(bytes), vget_low_s8(q)), hi = vmull_high_s8(bytes, q);
    return vaddq_s32(acc.q[i], vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi)));
#endif
  });
}
// The same for bytes 0 … 15, at most eight times after small_zero.
using small_sums = words;
inline small_sums small_zero() { return zero_words(); }
inline small_sums dot_small(small_sums acc, const words& w, const int8_t* x) { return dot_signed(acc, w, x); }
inline vec small_total(const small_sums& acc) { return to_float(acc); }

}  // namespace slip::SLIP_ISA
