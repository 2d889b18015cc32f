// 16 words of 32 bits, in which quantised weights come (packed.h), as two AVX2 registers; with VNNI where the variant has it.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "vec_avx2.h"

namespace slip::SLIP_ISA {

// Rows of a tile at most: for each row, and each byte of its inputs, there are two accumulators among the 16 registers. Without VNNI
// a product takes registers, too.
#ifdef __AVXVNNI__
constexpr int kExactRows = 6, kInt8Rows = 6, kInt16Rows = 3;
#else
constexpr int kExactRows = 6, kInt8Rows = 4, kInt16Rows = 2;
#endif

struct words {
  __m256i lo, hi;
};

inline void keep(words& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
inline words load_words(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_load_si256(q), _mm256_load_si256(q + 1)};
}
inline words zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline vec to_float(words w) { return {_mm256_cvtepi32_ps(w.lo), _mm256_cvtepi32_ps(w.hi)}; }
inline vec halves16(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_load_si128(q)), _mm256_cvtph_ps(_mm_load_si128(q + 1))};
}
inline vec signed16(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return to_float({_mm256_cvtepi8_epi32(_mm_loadl_epi64(q)),
                   _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))});
}

// 16 whole numbers, -127 … 127, as bytes.
inline void narrow(int8_t* p, vec whole) {
  const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(whole.lo), _mm256_cvtps_epi32(whole.hi));  // by halves of registers
  const __m256i in_order = _mm256_permute4x64_epi64(both, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(in_order), _mm256_extracti128_si256(in_order, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

// Half byte I of each word, times 16^I; the last one as it is.
template <int I>
inline vec half_byte(words w) {
  if constexpr (I == 7) return to_float({_mm256_srli_epi32(w.lo, 28), _mm256_srli_epi32(w.hi, 28)});
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(15u << (4 * (I % 7))));
  return to_float({_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)});
}
// Byte I of each word, with its sign.
template <int I>
inline vec signed_byte(words w) {
  constexpr int up = 24 - 8 * I;
  return to_float({_mm256_srai_epi32(_mm256_slli_epi32(w.lo, up), 24), _mm256_srai_epi32(_mm256_slli_epi32(w.hi, up), 24)});
}

// Bytes of the low and high halves of bytes.
inline words low_halves(words w) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(w.lo, mask), _mm256_and_si256(w.hi, mask)};
}
inline words high_halves(words w) { return low_halves({_mm256_srli_epi32(w.lo, 4), _mm256_srli_epi32(w.hi, 4)}); }

inline __m256i quad(const int8_t* x) {
  int32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return _mm256_set1_epi32(bits);
}

#ifdef __AVXVNNI__
// Bytes without signs times bytes with signs, four of them in each word.
using small_sums = words;
inline small_sums small_zero() { return zero_words(); }
inline small_sums dot_small(small_sums acc, words w, const int8_t* x) {
  const __m256i q = quad(x);
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, q), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, q)};
}
inline vec small_total(small_sums acc) { return to_float(acc); }

// The instruction takes one factor without signs: weights with 128 added. Sums start with what that is too much.
using signed_words = words;
inline words signed_zero(const int32_t* start) { return {_mm256_set1_epi32(*start), _mm256_set1_epi32(*start)}; }
inline signed_words load_signed(const uint8_t* p) {
  const words w = load_words(p);
  const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
  return {_mm256_xor_si256(w.lo, sign), _mm256_xor_si256(w.hi, sign)};
}
inline words dot_signed(words acc, signed_words w, const int8_t* x) { return dot_small(acc, w, x); }
#else
// Sums of at most eight products of quads, of bytes 0 … 15 with -127 … 127: 16 bits hold 8 * 2 * 15 * 127.
using small_sums = words;
inline small_sums small_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline small_sums dot_small(small_sums acc, words w, const int8_t* x) {
  const __m256i q = quad(x);
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, q)), _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, q))};
}
inline vec small_total(small_sums acc) {
  const __m256i ones = _mm256_set1_epi16(1);
  return to_float({_mm256_madd_epi16(acc.lo, ones), _mm256_madd_epi16(acc.hi, ones)});
}

// Products of bytes with signs: of the sizes of weights with inputs that take over their signs. 16 bits hold 2 * 128 * 127.
struct signed_words {
  words w, size;
};
inline words signed_zero(const int32_t*) { return zero_words(); }
inline signed_words load_signed(const uint8_t* p) {
  const words w = load_words(p);
  return {w, {_mm256_abs_epi8(w.lo), _mm256_abs_epi8(w.hi)}};
}
inline words dot_signed(words acc, const signed_words& w, const int8_t* x) {
  const __m256i q = quad(x), ones = _mm256_set1_epi16(1);
  const __m256i lo = _mm256_maddubs_epi16(w.size.lo, _mm256_sign_epi8(q, w.w.lo));
  const __m256i hi = _mm256_maddubs_epi16(w.size.hi, _mm256_sign_epi8(q, w.w.hi));
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(lo, ones)), _mm256_add_epi32(acc.hi, _mm256_madd_epi16(hi, ones))};
}
#endif

}  // namespace slip::SLIP_ISA
