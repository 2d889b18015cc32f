// 16 words of 32 bits, in which quantised weights come (packed.h), as one AVX-512 register; with VNNI where the variant has it.
#pragma once
#include "vec_avx512.h"

namespace slip::SLIP_ISA {

// Rows of a tile at most; more would take longer to compile than they save.
constexpr int kExactRows = 6, kInt8Rows = 8, kInt16Rows = 6;

using words = __m512i;

inline void keep(words& a) { asm volatile("" : "+v"(a)); }
inline words load_words(const uint8_t* p) { return _mm512_load_si512(p); }
inline words zero_words() { return _mm512_setzero_si512(); }
inline vec to_float(words w) { return _mm512_cvtepi32_ps(w); }
inline vec halves16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(p))); }
inline vec signed16(const uint8_t* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p))));
}

// 16 whole numbers, -127 … 127, as bytes.
inline void narrow(int8_t* p, vec whole) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(whole)));
}

// Half byte I of each word, times 16^I; the last one as it is.
template <int I>
inline vec half_byte(words w) {
  if constexpr (I == 7) return to_float(_mm512_srli_epi32(w, 28));
  return to_float(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(15u << (4 * (I % 7))))));
}
// Byte I of each word, with its sign.
template <int I>
inline vec signed_byte(words w) {
  return to_float(_mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * I), 24));
}

// Bytes of the low and high halves of bytes.
inline words low_halves(words w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
inline words high_halves(words w) { return low_halves(_mm512_srli_epi32(w, 4)); }

inline int32_t quad_bits(const int8_t* x) {
  int32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return bits;
}

#ifdef __AVX512VNNI__
// Bytes without signs times bytes with signs, four of them in each word.
using small_sums = words;
inline small_sums small_zero() { return zero_words(); }
inline small_sums dot_small(small_sums acc, words w, const int8_t* x) {
  return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(quad_bits(x)));
}
inline vec small_total(small_sums acc) { return to_float(acc); }

// The instruction takes one factor without signs: weights with 128 added. Sums start with what that is too much.
using signed_words = words;
inline words signed_zero(const int32_t* start) { return _mm512_set1_epi32(*start); }
inline signed_words load_signed(const uint8_t* p) { return _mm512_xor_si512(load_words(p), _mm512_set1_epi8(static_cast<char>(0x80))); }
inline words dot_signed(words acc, signed_words w, const int8_t* x) { return dot_small(acc, w, x); }
#else
// Sums of at most eight products of quads, of bytes 0 … 15 with -127 … 127: 16 bits hold 8 * 2 * 15 * 127.
using small_sums = words;
inline small_sums small_zero() { return zero_words(); }
inline small_sums dot_small(small_sums acc, words w, const int8_t* x) {
  return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, _mm512_set1_epi32(quad_bits(x))));
}
inline vec small_total(small_sums acc) { return to_float(_mm512_madd_epi16(acc, _mm512_set1_epi16(1))); }

// Sizes of weights times inputs that take over their signs. 16 bits hold 2 * 128 * 127.
struct signed_words {
  words size;
  __mmask64 negative;
};
inline words signed_zero(const int32_t*) { return zero_words(); }
inline signed_words load_signed(const uint8_t* p) {
  const words w = load_words(p);
  return {_mm512_abs_epi8(w), _mm512_movepi8_mask(w)};
}
inline words dot_signed(words acc, const signed_words& w, const int8_t* x) {
  const words q = _mm512_set1_epi32(quad_bits(x));
  const words with_signs = _mm512_mask_sub_epi8(q, w.negative, zero_words(), q);
  return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(w.size, with_signs), _mm512_set1_epi16(1)));
}
#endif

}  // namespace slip::SLIP_ISA
