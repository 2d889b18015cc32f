// Weights, keys and values in float32, and in bfloat16 where there are no instructions for it. Included once per instruction
// set, inside its namespace.
//
// A policy says how panels are stored (`elem`, kPair of them together), how rows that are multiplied with them are kept (`row`),
// and how a step along the reduction is done: in kParts parts, each a vector of the panel and one number of the row. With kTiles
// whole blocks of rows and panels are multiplied at once (tiles.h).

struct F32 {
  using elem = float;
  using row = float;
  static constexpr int kPair = 1, kParts = 1;
  static constexpr bool kTiles = false;
  using wvec = vec;
  using xvec = vec;
  template <int Part>
  static wvec load(const elem* p) { return vload(p); }
  static xvec broadcast(const row* p) { return vset1(*p); }
  static vec dot(vec acc, xvec x, wvec w) { return vfma(x, w, acc); }
  static void store(row* p, vec a) { vstore(p, a); }
  static void store_exact(elem* p, vec a, vec b) { vstore(p, a), vstore(p + 16, b); }
  static float widen(elem x) { return x; }
  static elem narrow(float x) { return x; }
};

#ifndef SLIP_OWN_BF16
// Widened to float32 in registers, so products and sums are those of float32; rows are rounded to bfloat16, and kept widened.
struct Bf16 {
  using elem = uint16_t;
  struct row {
    float value;
  };
  static constexpr int kPair = 2, kParts = 2;
  static constexpr bool kTiles = false;
  using wvec = vec;
  using xvec = vec;
  template <int Part>
  static wvec load(const elem* p) { return Part == 0 ? vfirst(p) : vsecond(p); }
  static xvec broadcast(const row* p) { return vset1(p->value); }
  static vec dot(vec acc, xvec x, wvec w) { return vfma(x, w, acc); }
  static void store(row* p, vec a) { vstore(&p->value, vround(a)); }
  // 32 numbers that bfloat16 has, one behind the other.
  static void store_exact(elem* p, vec a, vec b) { vstore_halves(p, a), vstore_halves(p + 16, b); }
  // Two neighbours along the reduction, of 16 columns, rounded for `dot`; and stored as panels hold them.
  static void rounded(vec even, vec odd, wvec (&out)[kParts]) { out[0] = vround(even), out[1] = vround(odd); }
  static void store_pairs(elem* p, const wvec (&pairs)[kParts]) { vstore_pairs(p, pairs[0], pairs[1]); }
  static float widen(elem x) { return bf16_to_float(x); }
  static elem narrow(float x) { return bf16_of(x); }
};
#endif
