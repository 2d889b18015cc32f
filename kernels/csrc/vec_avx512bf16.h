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
  // Two neighbours along the reduction, of 16 columns, rounded for `dot`; and stored as panels hold them.
  static void rounded(vec even, vec odd, wvec (&out)[kParts]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    out[0] = (__m512bh)_mm512_permutexvar_epi16(order, (__m512i)Bytes::joined(even, odd));
  }
  static void store_pairs(elem* p, const wvec (&pairs)[kParts]) { _mm512_store_si512(p, (__m512i)pairs[0]); }

  // The same where numbers are bytes, with fewer instructions. A quarter of a register has four columns, of which one vector takes
  // two and another the other two, each input of a pair beside the other: so rounding leaves them where `dot` wants them.
  struct Bytes {
    static constexpr float kOne = 0x1p-24f;  // bytes are taken as the highest of 32 bits
    static void apart(vec columns, vec (&out)[2]) {
      out[0] = _mm512_unpacklo_ps(columns, columns), out[1] = _mm512_unpackhi_ps(columns, columns);
    }
    // Bytes 2 Pair and 2 Pair + 1 of each word, over kOne.
    template <int Pair>
    static void pairs(__m512i w, vec (&out)[2]) {
      constexpr int kFirst = (2 * Pair << 24) + 0x808080, kColumn = 4 << 24, kInput = 1 << 24;
      for (int i = 0; i < 2; ++i) {
        const int first = kFirst + 2 * i * kColumn;
        const __m512i order = _mm512_set4_epi32(first + kColumn + kInput, first + kColumn, first + kInput, first);
        out[i] = _mm512_cvtepi32_ps(_mm512_shuffle_epi8(w, order));
      }
    }
    static wvec joined(vec first, vec second) { return _mm512_cvtne2ps_pbh(second, first); }
    static vec in_order(vec sums) { return _mm512_permutexvar_ps(columns(), sums); }
    static void store_in_order(elem* p, wvec pairs) { _mm512_store_si512(p, _mm512_permutexvar_epi32(columns(), (__m512i)pairs)); }
    // Where each column is.
    static __m512i columns() { return _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15); }
  };
  static float widen(elem x) { return bf16_to_float(x); }
  static elem narrow(float x) { return bf16_of(x); }
};
#ifndef SLIP_TILES
using Bf16 = VectorBf16;
#endif

}  // namespace slip::SLIP_ISA
