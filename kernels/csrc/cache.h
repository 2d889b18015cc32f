// The paged cache: places in it, what is written there, and numbers of 8 bits. Included once per instruction set, inside its
// namespace.
//
// A head of a token that is kept in 8 bits is divided by a scale of its own and rounded, so its bytes depend on nothing but the
// token, and are the same whatever the instruction set. The scale is a bfloat16, rounded upwards so that the largest number of the
// head fits; where that is infinite or none, so is the scale, and with it whatever attention sees of the token.

constexpr int kMaxHeadDim = 256;
constexpr float kLargestInt8 = 127.0f;
constexpr float kLargestFp8 = 448.0f;

template <class D>
struct Cache {
  const SlipAttention& a;
  const SlipBatch& b;
  size_t tile_elems() const { return static_cast<size_t>(a.head_dim) * 16; }
  int tile(int segment, int index) const {
    const int32_t* table = b.block_tables + static_cast<size_t>(b.table_row[segment]) * b.table_stride;
    return table[index / b.tiles_per_block] * b.tiles_per_block + index % b.tiles_per_block;
  }
  template <class T>
  T* at(T* cache, int tile_index, int kv_head) const {
    return cache + (static_cast<size_t>(tile_index) * a.kv_heads + kv_head) * tile_elems();
  }
  // Where those of a tile of 8 bits begin.
  size_t scales(int tile_index, int kv_head) const { return (static_cast<size_t>(tile_index) * a.kv_heads + kv_head) * 16; }
};

// Whole numbers: added to 1.5 * 2^23 they stand in the low bits, rounded to the nearest, of two to the even one.
inline uint32_t whole_of(float x) { return __builtin_bit_cast(uint32_t, x + 12582912.0f); }
inline uint8_t int8_of(float x) { return static_cast<uint8_t>(whole_of(x)); }
// Four bits of exponent, three of mantissa: as a float has them, but for those below 2^-6, which are multiples of 2^-9.
inline uint8_t fp8_of(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), size = bits & 0x7fffffff;
  const uint32_t nearest = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t small = whole_of(__builtin_bit_cast(float, size) * 512.0f);
  const uint32_t code = (size < 0x3c800000 ? small : nearest) | (bits >> 24 & 0x80);
  return static_cast<uint8_t>(size < 0x7f800000 ? code : 0);
}

// The bytes of a head x [head_dim], and the scale to multiply them with.
inline uint16_t quantise_head(int form, const float* x, int head_dim, uint8_t* bytes) {
  vec largest = vzero();
  unsigned none = 0;
  for (int d = 0; d < head_dim; d += 16) {
    const vec v = vload(x + d);
    largest = vmax(largest, vmax(v, vsub(vzero(), v)));
    none |= vnan(v);
  }
  const float wanted = vmaximum(largest) / (form == SLIP_CACHE_INT8 ? kLargestInt8 : kLargestFp8);
  const uint16_t scale = none ? 0x7fc0 : static_cast<uint16_t>((__builtin_bit_cast(uint32_t, wanted) + 0xffff) >> 16);
  alignas(64) float divided[kMaxHeadDim];
  const vec by = vset1(bf16_to_float(scale));
  for (int d = 0; d < head_dim; d += 16) vstore(divided + d, vdiv(vload(x + d), by));
  if (form == SLIP_CACHE_INT8)
    for (int d = 0; d < head_dim; ++d) bytes[d] = int8_of(divided[d]);
  else
    for (int d = 0; d < head_dim; ++d) bytes[d] = fp8_of(divided[d]);
  return scale;
}

// What bytes stand for, without scales; D has all of these numbers. There is none that is not finite among them.
template <class D>
inline void widen_tile(int form, const uint8_t* bytes, size_t count, typename D::elem* out) {
  const auto widen = [&](const auto& load) {
    for (size_t i = 0; i < count; i += 32) D::store_exact(out + i, load(bytes + i), load(bytes + i + 16));
  };
  if (form == SLIP_CACHE_INT8) widen([](const uint8_t* p) { return vint8(p); });
  else widen([](const uint8_t* p) { return vfp8(p); });
}

// Writes k, v [head_dim] of one token and head at its place in the tile, as `narrow` makes them.
template <class D, class T, class F>
inline void store_token(T* k_tile, T* v_tile, int slot, int head_dim, const F& narrow) {
  constexpr int kPair = D::kPair;
  for (int d = 0; d < head_dim; ++d) k_tile[(d / kPair) * 16 * kPair + slot * kPair + d % kPair] = narrow(0, d);
  for (int d = 0; d < head_dim; ++d)
    v_tile[static_cast<size_t>(d / 16) * 256 + (slot / kPair) * 16 * kPair + (d % 16) * kPair + slot % kPair] = narrow(1, d);
}

template <class D>
inline void store_head(const Cache<D>& cache, void* k_cache, void* v_cache, int tile, int kv_head, int slot, const float* k,
                       const float* v) {
  const SlipAttention& a = cache.a;
  const float* kv[2] = {k, v};
  if (a.cache_form == SLIP_CACHE_PLAIN) {
    using T = typename D::elem;
    return store_token<D>(cache.at(static_cast<T*>(k_cache), tile, kv_head), cache.at(static_cast<T*>(v_cache), tile, kv_head), slot,
                          a.head_dim, [&](int which, int d) { return D::narrow(kv[which][d]); });
  }
  uint8_t bytes[2][kMaxHeadDim];
  for (int which : {0, 1}) {
    uint16_t* scales = which ? a.v_scales : a.k_scales;
    scales[cache.scales(tile, kv_head) + slot] = quantise_head(a.cache_form, kv[which], a.head_dim, bytes[which]);
  }
  using T = uint8_t;
  store_token<D>(cache.at(static_cast<T*>(k_cache), tile, kv_head), cache.at(static_cast<T*>(v_cache), tile, kv_head), slot, a.head_dim,
                 [&](int which, int d) { return bytes[which][d]; });
}

// Writes k, v [kv_heads, head_dim] of one token where the mirror (token, block, offset) says.
template <class D>
inline void store_mirror(const Cache<D>& cache, void* k_cache, void* v_cache, const int32_t* mirror, const float* k,
                         const float* v) {
  const int head_dim = cache.a.head_dim;
  const int tile = mirror[1] * cache.b.tiles_per_block + mirror[2] / 16;
  for (int h = 0; h < cache.a.kv_heads; ++h)
    store_head<D>(cache, k_cache, v_cache, tile, h, mirror[2] % 16, k + h * head_dim, v + h * head_dim);
}
