// Dot products of bfloat16 with AVX-512 BF16.
#pragma once
#include "vec_avx512.h"

namespace slip::SLIP_ISA {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels, whose sums take 24 of the 32
// registers.
constexpr int kMaxRows = 6;
constexpr int tile_panels(int) { return 4; }

struct VectorBf16 {
  using elem = uint16_t;
  using row = uint16_t;
  static constexpr int kPair = 2, kParts = 1;
  static constexpr bool kTiles = false;
  using wvec = __m512bh;
  using xvec = __m512bh;
  template <int Part>
  static wvec load(const elem* p) { return (__m512bh)_mm512_load_si512(p); }
  static xvec broadcast(const row* p) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
  static vec dot(vec acc, xvec x, wvec w) { return _mm512_dpbf16_ps(acc, x, w); }
  static void store(row* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a)); }
  // 32 numbers that bfloat16 has, one behind the other.
  static void store_exact(elem* p, vec a, vec b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
  // Two neighbours along the reduction, of 16 columns, rounded: for `dot`, and as panels hold them.
  static void rounded(vec even, vec odd, wvec (&out)[kParts]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    out[0] = (__m512bh)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
  static void store_rounded(elem* p, vec even, vec odd) {
    wvec pairs[kParts];
    rounded(even, odd, pairs);
    _mm512_store_si512(p, (__m512i)pairs[0]);
  }
  static float widen(elem x) { return bf16_to_float(x); }
  static elem narrow(float x) { return bf16_of(x); }
};
#ifndef SLIP_TILES
using Bf16 = VectorBf16;
#endif

}  // namespace slip::SLIP_ISA
