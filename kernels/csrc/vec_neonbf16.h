// Dot products of bfloat16 with the instructions of ARMv8.6: Neoverse V1 and N2, Graviton 3, Apple M2 and later.
#pragma once
#include "vec_neon.h"

namespace slip::SLIP_ISA {

// BFDOT, not BFMMLA: that multiplies rows by twos, with panels that have four inputs of a column beside each other.
struct Bf16 {
  using elem = uint16_t;
  using row = uint16_t;
  static constexpr int kPair = 2, kParts = 1;
  static constexpr bool kTiles = false;
  struct wvec {
    bfloat16x8_t q[4];
  };
  using xvec = bfloat16x8_t;
  template <int Part>
  static wvec load(const elem* p) {
    const auto quarter = [&](int i) { return vreinterpretq_bf16_u16(vld1q_u16(p + 8 * i)); };
    return {{quarter(0), quarter(1), quarter(2), quarter(3)}};
  }
  static xvec broadcast(const row* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  static vec dot(vec acc, xvec x, const wvec& w) { return each([&](int i) { return vbfdotq_f32(acc.q[i], w.q[i], x); }); }
  static void store(row* p, vec a) {
    for (int i = 0; i < 4; i += 2) vst1q_u16(p + 4 * i, vreinterpretq_u16_bf16(joined(a.q[i], a.q[i + 1])));
  }
  // 32 numbers that bfloat16 has, one behind the other.
  static void store_exact(elem* p, const vec& a, const vec& b) { store(p, a), store(p + 16, b); }
  // Two neighbours along the reduction, of 16 columns, rounded for `dot`; and stored as panels hold them.
  static void rounded(const vec& even, const vec& odd, wvec (&out)[kParts]) {
    for (int i = 0; i < 4; ++i) {
      const uint16x8_t both = vreinterpretq_u16_bf16(joined(even.q[i], odd.q[i]));
      out[0].q[i] = vreinterpretq_bf16_u16(vzip1q_u16(both, vextq_u16(both, both, 4)));
    }
  }
  static void store_pairs(elem* p, const wvec (&pairs)[kParts]) {
    for (int i = 0; i < 4; ++i) vst1q_u16(p + 8 * i, vreinterpretq_u16_bf16(pairs[0].q[i]));
  }
  static float widen(elem x) { return bf16_to_float(x); }
  static elem narrow(float x) { return bf16_of(x); }

 private:
  static bfloat16x8_t joined(float32x4_t low, float32x4_t high) { return vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high); }
};

}  // namespace slip::SLIP_ISA
