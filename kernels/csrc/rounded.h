// Rows times quantised panels whose numbers are rounded to bfloat16 where they are used: what comes out has the bits that it has
// with weights that were kept in bfloat16. Included once per instruction set, inside its namespace, after packed.h.
//
// For few rows numbers stay in registers. For more of them a group of panels is laid out as a matrix in bfloat16 has it, in a
// core's own cache, and what multiplies such matrices goes on from there.

constexpr int kRoundedRows = 6;  // as many share what was rounded in registers

constexpr int rounded_panels(int rows) { return kExactRows == 1 ? 1 : rows <= 2 ? 4 : 2; }

// Whether D takes bytes apart so that pairs of inputs lie as `dot` wants them, with the columns of a panel in an order of its own.
template <int Form, class D>
constexpr bool kOwnOrder = layout(Form).bits == 8 && requires { typename D::Bytes; };

// Calls f(i, w) with inputs 2 i and 2 i + 1 of block b, rounded, as D multiplies them; in D's own order where it has one.
template <int Form, class D, class F>
[[gnu::always_inline]] inline void widen_block(const uint8_t* group, int b, int panel, const F& f) {
  constexpr Layout l = layout(Form);
  const Block<Form> block(group, b, panel);
  const uint8_t* at = group + l.words_at(b, panel);
  constexpr int parts = l.sixteen ? 2 : 1, words_each = l.bits / parts;
  const auto number = [](vec v, vec by, vec minimum) {
    if constexpr (l.minimum == Minimum::kNone) return vmul(v, by);
    else return vfma(v, by, minimum);
  };
  const auto give = [&](int i, vec even, vec odd) __attribute__((always_inline)) {
    typename D::wvec w[D::kParts];
    D::rounded(even, odd, w);
    f(i, w);
  };
  unrolled<parts>([&]<int Part>() {
    const vec scale = block.scale(Part);
    vec minimum = vzero();
    if constexpr (l.minimum != Minimum::kNone) minimum = block.minimum(scale);
    if constexpr (l.bits == 4) {
      vec by[8];  // the scale of each field
#pragma GCC unroll 8
      for (int field = 0; field < 8; ++field) by[field] = vmul(scale, vset1(kShare[field]));
#pragma GCC unroll 1
      for (int word = 0; word < words_each; ++word) {
        const words w = load_words(at + word * 64);
        unrolled<4>([&]<int Pair>() {
          constexpr int even = input_field(2 * Pair), odd = input_field(2 * Pair + 1);
          give(word * 4 + Pair, number(half_byte<even>(w), by[even], minimum), number(half_byte<odd>(w), by[odd], minimum));
        });
      }
    } else if constexpr (kOwnOrder<Form, D>) {
      vec by[2], least[2];
      D::Bytes::apart(vmul(scale, vset1(D::Bytes::kOne)), by);
      D::Bytes::apart(minimum, least);
#pragma GCC unroll 1
      for (int word = Part * words_each; word < (Part + 1) * words_each; ++word) {
        const words w = load_words(at + word * 64);
        unrolled<2>([&]<int Pair>() {
          vec some[2];
          D::Bytes::template pairs<Pair>(w, some);
          typename D::wvec pairs[1] = {D::Bytes::joined(number(some[0], by[0], least[0]), number(some[1], by[1], least[1]))};
          f(word * 2 + Pair, pairs);
        });
      }
    } else {
#pragma GCC unroll 1
      for (int word = Part * words_each; word < (Part + 1) * words_each; ++word) {
        const words w = load_words(at + word * 64);
        unrolled<2>([&]<int Pair>() {
          give(word * 2 + Pair, number(signed_byte<2 * Pair>(w), scale, minimum), number(signed_byte<2 * Pair + 1>(w), scale, minimum));
        });
      }
    }
  });
}

// R rows of x times P panels of a group, into out [R][4][16]. Asks for the same panels of the group at `ahead` meanwhile.
template <int Form, class D, int R, int P>
inline void rounded_tile(const uint8_t* group, const uint8_t* ahead, int panel, int blocks, const typename D::row* x, size_t ldx,
                         float* out) {
  constexpr Layout l = layout(Form);
  vec total[R][P];
  clear(total);
  for (int b = 0; b < blocks; ++b) {
    if (ahead) {
#pragma GCC unroll 16
      for (int line = 0; line < P * (l.words() + l.side()); line += 64)
        __builtin_prefetch(ahead + l.block_at(b) + panel * (l.words() + l.side()) + line, 0, 3);
    }
    const typename D::row* from = x + 32 * static_cast<size_t>(b);
    unrolled<P>([&]<int I>() {
      widen_block<Form, D>(group, b, panel + I, [&](int pair, const auto& w) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int part = 0; part < D::kParts; ++part)
            total[r][I] = D::dot(total[r][I], D::broadcast(from + r * ldx + 2 * pair + part), w[part]);
      });
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      if constexpr (kOwnOrder<Form, D>) total[r][p] = D::Bytes::in_order(total[r][p]);
      vstore(out + (r * 4 + panel + p) * 16, total[r][p]);
    }
}

// The same for panels first … last - 1 of a group, and all rows.
template <int Form, class D, int R>
static void rounded_rows(const uint8_t* group, const uint8_t* ahead, int first, int last, int blocks, const typename D::row* x,
                         size_t ldx, float* out) {
  constexpr int P = rounded_panels(R);
  int panel = first;
  for (; panel + P <= last; panel += P) rounded_tile<Form, D, R, P>(group, ahead, panel, blocks, x, ldx, out);
  if constexpr (P > 1)
    for (; panel < last; ++panel) rounded_tile<Form, D, R, 1>(group, ahead, panel, blocks, x, ldx, out);
}

// Panels first … last - 1 of a group as a matrix in D has them: [k / 2][4][16][2].
template <int Form, class D>
static void lay_out_group(const uint8_t* group, int first, int last, int blocks, typename D::elem* out) {
  for (int b = 0; b < blocks; ++b)
    for (int panel = first; panel < last; ++panel)
      widen_block<Form, D>(group, b, panel, [&](int pair, const auto& w) __attribute__((always_inline)) {
        typename D::elem* to = out + (static_cast<size_t>(16 * b + pair) * kGroup + panel) * 32;
        if constexpr (kOwnOrder<Form, D>) D::Bytes::store_in_order(to, w[0]);
        else D::store_pairs(to, w);
      });
}

// A thread's room for one group that was laid out.
template <class D>
inline typename D::elem* room_for_group(int k) {
  static thread_local std::vector<typename D::elem> room;
  constexpr size_t kLine = 64 / sizeof(typename D::elem);
  const size_t size = static_cast<size_t>(k) * kGroup * 16 + kLine;
  if (room.size() < size) room.resize(size);  // what is added is filled with zeros, so it never gets smaller in between
  const auto begin = reinterpret_cast<uintptr_t>(room.data());
  return room.data() + ((begin + 63) / 64 * 64 - begin) / sizeof(typename D::elem);
}

// P panels from `first` on, laid out, times all rows; asks for memory from `ahead` to `end` meanwhile.
template <class D, int P, class Epilogue>
inline void laid_out_panels(const typename D::row* x, size_t ldx, int rows, const typename D::elem* first, int k, int column,
                            const char* ahead, const char* end, const Epilogue& epilogue) {
  if constexpr (D::kTiles) return tile_group<D, P>(x, ldx, rows, first, k, column, nullptr, epilogue);
  const typename D::elem* panels[P];
  for (int p = 0; p < P; ++p) panels[p] = first + p * 32;
  const int steps = k / 2;
  vec acc[kMaxRows][P];
  for_row_tiles(rows, [&]<int R>(int row) {
    constexpr int W = std::min(tile_panels(R), P);
    if (P == kGroup && ahead < end) {
      row_tile<D, R, P, 1, false>(x + row * ldx, ldx, panels, steps, ahead, acc);
      ahead += static_cast<size_t>(P / W) * steps * 64;
    } else {
      row_tile<D, R, P, 0, false>(x + row * ldx, ldx, panels, steps, nullptr, acc);
    }
    finish_rows(row, row + R, column, acc, epilogue);
  });
}

// Y = X W^T, to the bit as matmul does for the same numbers in bfloat16.
template <class D, class Epilogue>
inline void rounded_matmul(Team& team, const SlipLinear& w, const typename D::row* x, int rows, const Epilogue& epilogue) {
  const int blocks = w.k / 32;
  const size_t ldx = w.k;
  packed_groups(team, w, [&](int form, const uint8_t* group, const uint8_t* ahead, int first, int last, int column) {
    if (!D::kTiles && rows <= kRoundedRows) {
      alignas(64) float out[kRoundedRows * 64];
      of_form(form, [&]<int Form>() {
        tile_of<kRoundedRows>(rows, 0, [&]<int R>(int) { rounded_rows<Form, D, R>(group, ahead, first, last, blocks, x, ldx, out); });
      });
      return finish_panels(out, 0, rows, first, last, column, epilogue);
    }
    typename D::elem* laid_out = room_for_group<D>(w.k);
    of_form(form, [&]<int Form>() { lay_out_group<Form, D>(group, first, last, blocks, laid_out); });
    const char* from = reinterpret_cast<const char*>(ahead);
    const char* end = from ? from + layout(form).group(w.k) : nullptr;
    int p = first;
    if (last - first == kGroup)
      return laid_out_panels<D, kGroup>(x, ldx, rows, laid_out, w.k, column, from, end, epilogue);
    for (; p + 2 <= last; p += 2)
      laid_out_panels<D, 2>(x, ldx, rows, laid_out + p * 32, w.k, column + p - first, nullptr, nullptr, epilogue);
    for (; p < last; ++p)
      laid_out_panels<D, 1>(x, ldx, rows, laid_out + p * 32, w.k, column + p - first, nullptr, nullptr, epilogue);
  });
}
