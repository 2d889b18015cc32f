// 16 float lanes as one AVX-512 register: what all AVX-512 variants share.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "bf16.h"

namespace slip::SLIP_ISA {

using vec = __m512;

// The compiler knows nothing of a from here on.
inline void keep(vec& a) { asm volatile("" : "+v"(a)); }
inline vec vzero() { return _mm512_setzero_ps(); }
inline vec vset1(float x) { return _mm512_set1_ps(x); }
inline vec vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, vec a) { _mm512_storeu_ps(p, a); }
inline vec vadd(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec vsub(vec a, vec b) { return _mm512_sub_ps(a, b); }
inline vec vmul(vec a, vec b) { return _mm512_mul_ps(a, b); }
inline vec vdiv(vec a, vec b) { return _mm512_div_ps(a, b); }
inline vec vmax(vec a, vec b) { return _mm512_max_ps(a, b); }
inline vec vfma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float vsum(vec a) { return _mm512_reduce_add_ps(a); }
inline float vmaximum(vec a) { return _mm512_reduce_max_ps(a); }
// Lanes 0 … count-1 of a, the others `fill`.
inline vec vkeep(vec a, int count, float fill) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
  return _mm512_mask_blend_ps(mask, _mm512_set1_ps(fill), a);
}
// One bit per lane: is it not a number, is a equal to b, is a at least b.
inline unsigned vnan(vec a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline unsigned vequal(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline unsigned vatleast(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// The lanes of a that are at least b, the others 0.
inline vec vkeep_atleast(vec a, vec b) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), a); }
// e^x to about one unit in the last place; exactly 0 below -87.
inline vec vexp(vec x) {
  const __mmask16 live = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
  const vec magic = _mm512_set1_ps(12582912.0f);
  const vec shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), magic);
  const vec n = _mm512_sub_ps(shifted, magic);
  vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  vec p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_maskz_mov_ps(live, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power)));
}

// Lanes of 64 bits, for products of their low halves.
using wide = __m512i;
inline wide wset1(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
inline wide wload(const uint64_t* p) { return _mm512_loadu_si512(p); }
inline void wstore(uint64_t* p, wide a) { _mm512_storeu_si512(p, a); }
inline wide wxor(wide a, wide b) { return _mm512_xor_si512(a, b); }
inline wide wproduct(wide a, wide b) { return _mm512_mul_epu32(a, b); }
inline wide whigh(wide a) { return _mm512_srli_epi64(a, 32); }

// 16 numbers of 8 bits: whole ones, and e4m3 (cache.h).
inline __m512i vbytes(const uint8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vec vint8(const uint8_t* p) { return _mm512_cvtepi32_ps(vbytes(p)); }
inline vec vfp8(const uint8_t* p) {
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(vbytes(p), 20), _mm512_set1_epi32(static_cast<int>(0x87f00000u)));
  return _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
}
// 16 bfloat16 that lie one behind the other; and numbers that are rounded already as such.
inline vec vhalves(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void vstore_halves(uint16_t* p, vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a), 16)));
}

// 16 pairs of bfloat16: the first of each, the second of each.
inline vec vfirst(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_load_si512(p), 16)); }
inline vec vsecond(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_load_si512(p), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// To the nearest bfloat16.
inline vec vround(vec a) {
  const __m512i bits = _mm512_castps_si512(a), high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet), high));
}
// 16 pairs of numbers that are rounded already.
inline void vstore_pairs(uint16_t* p, vec first, vec second) {
  _mm512_store_si512(p, _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second)));
}

}  // namespace slip::SLIP_ISA
