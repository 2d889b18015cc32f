// 16 float lanes as two AVX2 registers: what all variants without AVX-512 share.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "bf16.h"

namespace slip::SLIP_ISA {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels. Of the 16 registers two for each
// row and panel are sums, so that no sum waits for itself from as many as eight on.
constexpr int kMaxRows = 6;
constexpr int tile_panels(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct vec {
  __m256 lo, hi;
};

// The compiler knows nothing of a from here on.
inline void keep(vec& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
inline vec vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vec vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vec vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vstore(float* p, vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline vec vadd(vec a, vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline vec vsub(vec a, vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline vec vmul(vec a, vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline vec vdiv(vec a, vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline vec vmax(vec a, vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline vec vfma(vec a, vec b, vec c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline float sum8(__m256 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float vsum(vec a) { return sum8(_mm256_add_ps(a.lo, a.hi)); }
inline float vmaximum(vec a) {
  const __m256 both = _mm256_max_ps(a.lo, a.hi);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
inline vec vkeep(vec a, int count, float fill) {
  const __m256i n = _mm256_set1_epi32(count);
  const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, first));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(n, _mm256_add_epi32(first, _mm256_set1_epi32(8))));
  const __m256 f = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(f, a.lo, lo), _mm256_blendv_ps(f, a.hi, hi)};
}
inline unsigned mask16(__m256 lo, __m256 hi) {
  return static_cast<unsigned>(_mm256_movemask_ps(lo)) | static_cast<unsigned>(_mm256_movemask_ps(hi)) << 8;
}
inline unsigned vnan(vec a) {
  return mask16(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q));
}
inline unsigned vequal(vec a, vec b) {
  return mask16(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
}
inline unsigned vatleast(vec a, vec b) {
  return mask16(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
}
inline vec vkeep_atleast(vec a, vec b) {
  return {_mm256_and_ps(a.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ)),
          _mm256_and_ps(a.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ))};
}
inline __m256 exp8(__m256 x) {
  const __m256 live = _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GT_OQ);
  x = _mm256_max_ps(_mm256_min_ps(x, _mm256_set1_ps(88.0f)), _mm256_set1_ps(-87.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_and_ps(live, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}
inline vec vexp(vec x) { return {exp8(x.lo), exp8(x.hi)}; }

// Lanes of 64 bits, for products of their low halves.
using wide = __m256i;
inline wide wset1(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
inline wide wload(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void wstore(uint64_t* p, wide a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline wide wxor(wide a, wide b) { return _mm256_xor_si256(a, b); }
inline wide wproduct(wide a, wide b) { return _mm256_mul_epu32(a, b); }
inline wide whigh(wide a) { return _mm256_srli_epi64(a, 32); }

// 16 numbers of 8 bits: whole ones, and e4m3 (cache.h).
inline __m256i bytes8(const uint8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline vec vint8(const uint8_t* p) { return {_mm256_cvtepi32_ps(bytes8(p)), _mm256_cvtepi32_ps(bytes8(p + 8))}; }
inline vec vfp8(const uint8_t* p) {
  const auto half = [](__m256i x) {
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(x, 20), _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
    return _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
  };
  return {half(bytes8(p)), half(bytes8(p + 8))};
}
// 16 bfloat16 that lie one behind the other; and numbers that are rounded already as such.
inline vec vhalves(const uint16_t* p) {
  const auto half = [](const uint16_t* q) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  };
  return {half(p), half(p + 8)};
}
inline void vstore_halves(uint16_t* p, vec a) {
  const __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(a.lo), 16), hi = _mm256_srli_epi32(_mm256_castps_si256(a.hi), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8));
}

// 16 pairs of bfloat16: the first of each, the second of each. Read twice, since one register more would not fit beside the sums.
inline vec vfirst(const uint16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(q), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256(q + 1), 16))};
}
inline vec vsecond(const uint16_t* p) {
  const volatile __m256i* q = reinterpret_cast<const volatile __m256i*>(p);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(q[0], high)), _mm256_castsi256_ps(_mm256_and_si256(q[1], high))};
}
// To the nearest bfloat16.
inline __m256 round8(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a), high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_blendv_epi8(nearest, quiet, none), high));
}
inline vec vround(vec a) { return {round8(a.lo), round8(a.hi)}; }
// 16 pairs of numbers that are rounded already.
inline void vstore_pairs(uint16_t* p, vec first, vec second) {
  const auto pairs = [](__m256 a, __m256 b) { return _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(a), 16), _mm256_castps_si256(b)); };
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), pairs(first.lo, second.lo));
  _mm256_store_si256(reinterpret_cast<__m256i*>(p) + 1, pairs(first.hi, second.hi));
}

}  // namespace slip::SLIP_ISA
