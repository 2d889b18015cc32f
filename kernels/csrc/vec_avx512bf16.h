// Dot products of bfloat16 with AVX-512 BF16.
#pragma once
#include "vec_avx512.h"

namespace slip::avx512bf16 {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels, whose sums take 24 of the 32
// registers.
constexpr int kMaxRows = 6;
constexpr int tile_panels(int) { return 4; }

struct Bf16 {
  using elem = uint16_t;
  using row = uint16_t;
  static constexpr int kPair = 2, kParts = 1;
  using wvec = __m512bh;
  using xvec = __m512bh;
  template <int Part>
  static wvec load(const elem* p) { return (__m512bh)_mm512_load_si512(p); }
  static xvec broadcast(const row* p) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(p)); }
  static vec dot(vec acc, xvec x, wvec w) { return _mm512_dpbf16_ps(acc, x, w); }
  static void store(row* p, vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a)); }
  static float widen(elem x) { return bf16_to_float(x); }
  static elem narrow(float x) { return bf16_of(x); }
};

}  // namespace slip::avx512bf16
