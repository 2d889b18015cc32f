// What packed.h needs, in plain C++: right on every instruction set, quick to compile, and fast on none. An instruction set that has its own says so by
// defining SLIP_OWN_WORDS, and supplies everything below with the same meaning; see words_avx2.h. Included inside its namespace.

// Rows of a tile at most.
constexpr int kExactRows = 1, kInt8Rows = 1, kInt16Rows = 1;

struct words {
  int32_t lanes[16];
};

inline void keep(words& a) { asm volatile("" : "+m"(a)); }
inline words load_words(const uint8_t* p) {
  words w;
  std::memcpy(w.lanes, p, 64);
  return w;
}
inline words zero_words() { return {}; }
[[gnu::noinline]] static vec to_float(words w) {
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(w.lanes[i]);
  return vload(lanes);
}
// 16 float16.
[[gnu::noinline]] static vec halves16(const uint8_t* p) {
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = half_to_float(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8));
  return vload(lanes);
}
// 16 bytes with signs.
[[gnu::noinline]] static vec signed16(const uint8_t* p) {
  words w;
  for (int i = 0; i < 16; ++i) w.lanes[i] = static_cast<int8_t>(p[i]);
  return to_float(w);
}

// 16 whole numbers, -127 … 127, as bytes.
inline void narrow(int8_t* p, const vec& whole) {
  alignas(64) float lanes[16];
  vstore(lanes, vadd(whole, vset1(12582912.0f)));  // 1.5 * 2^23: now they stand in the low bits
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(__builtin_bit_cast(uint32_t, lanes[i]));
}

// Half byte I of each word, times 16^I; the last one as it is.
template <int I>
[[gnu::noinline]] static vec half_byte(words w) {
  for (int32_t& lane : w.lanes) {
    const auto bits = static_cast<uint32_t>(lane);
    lane = static_cast<int32_t>(I == 7 ? bits >> 28 : bits & (15u << (4 * (I % 7))));
  }
  return to_float(w);
}
// Byte I of each word, with its sign.
template <int I>
[[gnu::noinline]] static vec signed_byte(words w) {
  for (int32_t& lane : w.lanes) lane = static_cast<int8_t>(static_cast<uint32_t>(lane) >> (8 * I));
  return to_float(w);
}

// Bytes of the low and high halves of bytes.
[[gnu::noinline]] static words low_halves(words w) {
  for (int32_t& lane : w.lanes) lane &= 0x0f0f0f0f;
  return w;
}
[[gnu::noinline]] static words high_halves(words w) {
  for (int32_t& lane : w.lanes) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) >> 4 & 0x0f0f0f0fu);
  return w;
}

// acc + the four bytes of each word, with signs, times four inputs, which are -127 … 127.
using signed_words = words;
inline words signed_zero(const int32_t*) { return zero_words(); }
inline signed_words load_signed(const uint8_t* p) { return load_words(p); }
[[gnu::noinline]] static words dot_signed(words acc, const signed_words& w, const int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int b = 0; b < 4; ++b) acc.lanes[i] += static_cast<int8_t>(static_cast<uint32_t>(w.lanes[i]) >> (8 * b)) * x[b];
  return acc;
}
// The same for bytes 0 … 15, at most eight times after small_zero.
using small_sums = words;
inline small_sums small_zero() { return {}; }
inline small_sums dot_small(small_sums acc, const words& w, const int8_t* x) { return dot_signed(acc, w, x); }
inline vec small_total(const small_sums& acc) { return to_float(acc); }
