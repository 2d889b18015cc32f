// 16 float lanes as four NEON registers, for 64-bit ARM: what all its variants share.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "bf16.h"

namespace slip::SLIP_ISA {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels. Of the 32 registers four for each
// row and panel are sums.
constexpr int kMaxRows = 6;
constexpr int tile_panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct vec {
  float32x4_t q[4];
};

template <class F>
[[gnu::always_inline]] inline vec each(const F& f) { return {{f(0), f(1), f(2), f(3)}}; }

// The compiler knows nothing of a from here on.
inline void keep(vec& a) { asm volatile("" : "+w"(a.q[0]), "+w"(a.q[1]), "+w"(a.q[2]), "+w"(a.q[3])); }
inline vec vzero() { return each([](int) { return vdupq_n_f32(0.0f); }); }
inline vec vset1(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
inline vec vload(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline void vstore(float* p, vec a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.q[i]);
}
inline vec vadd(vec a, vec b) { return each([&](int i) { return vaddq_f32(a.q[i], b.q[i]); }); }
inline vec vsub(vec a, vec b) { return each([&](int i) { return vsubq_f32(a.q[i], b.q[i]); }); }
inline vec vmul(vec a, vec b) { return each([&](int i) { return vmulq_f32(a.q[i], b.q[i]); }); }
inline vec vdiv(vec a, vec b) { return each([&](int i) { return vdivq_f32(a.q[i], b.q[i]); }); }
// As on other processors: b where either is not a number.
inline vec vmax(vec a, vec b) { return each([&](int i) { return vbslq_f32(vcgtq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); }); }
inline vec vfma(vec a, vec b, vec c) { return each([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); }); }
inline float vsum(vec a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.q[0], a.q[1]), vaddq_f32(a.q[2], a.q[3]))); }
inline float vmaximum(vec a) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a.q[0], a.q[1]), vmaxnmq_f32(a.q[2], a.q[3])));
}
// Lanes 0 … count-1 of a, the others `fill`.
inline vec vkeep(vec a, int count, float fill) {
  static constexpr int32_t kFirst[4] = {0, 1, 2, 3};
  const int32x4_t lane = vld1q_s32(kFirst);
  return each([&](int i) { return vbslq_f32(vcltq_s32(lane, vdupq_n_s32(count - 4 * i)), a.q[i], vdupq_n_f32(fill)); });
}
template <class F>
[[gnu::always_inline]] inline unsigned mask16(const F& f) {
  static constexpr uint32_t kBits[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(kBits);
  unsigned mask = 0;
  for (int i = 0; i < 4; ++i) mask |= vaddvq_u32(vandq_u32(f(i), bit)) << (4 * i);
  return mask;
}
// One bit per lane: is it not a number, is a equal to b, is a at least b.
inline unsigned vnan(vec a) { return mask16([&](int i) { return vmvnq_u32(vceqq_f32(a.q[i], a.q[i])); }); }
inline unsigned vequal(vec a, vec b) { return mask16([&](int i) { return vceqq_f32(a.q[i], b.q[i]); }); }
inline unsigned vatleast(vec a, vec b) { return mask16([&](int i) { return vcgeq_f32(a.q[i], b.q[i]); }); }
inline float32x4_t keep4(uint32x4_t mask, float32x4_t a) { return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(a))); }
// The lanes of a that are at least b, the others 0.
inline vec vkeep_atleast(vec a, vec b) { return each([&](int i) { return keep4(vcgeq_f32(a.q[i], b.q[i]), a.q[i]); }); }
// e^x to about one unit in the last place; exactly 0 below -87.
inline float32x4_t exp4(float32x4_t x) {
  const uint32x4_t live = vcgtq_f32(x, vdupq_n_f32(-87.0f));
  x = vmaxnmq_f32(vminnmq_f32(x, vdupq_n_f32(88.0f)), vdupq_n_f32(-87.0f));
  const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
  float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
  r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
  float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
  p = vfmaq_f32(vdupq_n_f32(1.3981999507e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(8.3334519073e-3f), p, r);
  p = vfmaq_f32(vdupq_n_f32(4.1665795894e-2f), p, r);
  p = vfmaq_f32(vdupq_n_f32(1.6666665459e-1f), p, r);
  p = vfmaq_f32(vdupq_n_f32(5.0000001201e-1f), p, r);
  p = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), vdupq_n_f32(1.0f));
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
  return keep4(live, vmulq_f32(p, vreinterpretq_f32_s32(power)));
}
inline vec vexp(vec x) { return each([&](int i) { return exp4(x.q[i]); }); }

// Lanes of 64 bits, for products of their low halves.
using wide = uint64x2_t;
inline wide wset1(uint64_t x) { return vdupq_n_u64(x); }
inline wide wload(const uint64_t* p) { return vld1q_u64(p); }
inline void wstore(uint64_t* p, wide a) { vst1q_u64(p, a); }
inline wide wxor(wide a, wide b) { return veorq_u64(a, b); }
inline wide wproduct(wide a, wide b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline wide whigh(wide a) { return vshrq_n_u64(a, 32); }

// 16 numbers of 8 bits: whole ones, and e4m3 (cache.h).
struct wholes {
  int32x4_t q[4];
};
inline wholes vbytes(const uint8_t* p) {
  const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(p));
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
inline vec vint8(const uint8_t* p) {
  const wholes x = vbytes(p);
  return each([&](int i) { return vcvtq_f32_s32(x.q[i]); });
}
inline vec vfp8(const uint8_t* p) {
  const wholes x = vbytes(p);
  return each([&](int i) {
    const uint32x4_t bits = vandq_u32(vreinterpretq_u32_s32(vshlq_n_s32(x.q[i], 20)), vdupq_n_u32(0x87f00000u));
    return vmulq_f32(vreinterpretq_f32_u32(bits), vdupq_n_f32(0x1p120f));
  });
}
// 16 bfloat16 that lie one behind the other; and numbers that are rounded already as such.
inline vec vhalves(const uint16_t* p) { return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); }); }
inline void vstore_halves(uint16_t* p, vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vshrn_n_u32(vreinterpretq_u32_f32(a.q[i]), 16));
}

// 16 pairs of bfloat16: the first of each, the second of each.
inline uint32x4_t pairs4(const uint16_t* p, int i) { return vreinterpretq_u32_u16(vld1q_u16(p + 8 * i)); }
inline vec vfirst(const uint16_t* p) { return each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs4(p, i), 16)); }); }
inline vec vsecond(const uint16_t* p) {
  return each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(pairs4(p, i), vdupq_n_u32(0xffff0000u))); });
}
// To the nearest bfloat16.
inline float32x4_t round4(float32x4_t a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vreinterpretq_f32_u32(vandq_u32(vbslq_u32(vceqq_f32(a, a), nearest, quiet), vdupq_n_u32(0xffff0000u)));
}
inline vec vround(vec a) { return each([&](int i) { return round4(a.q[i]); }); }
// 16 pairs of numbers that are rounded already.
inline void vstore_pairs(uint16_t* p, vec first, vec second) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t low = vshrq_n_u32(vreinterpretq_u32_f32(first.q[i]), 16);
    vst1q_u16(p + 8 * i, vreinterpretq_u16_u32(vorrq_u32(low, vreinterpretq_u32_f32(second.q[i]))));
  }
}

}  // namespace slip::SLIP_ISA
