// Rows times quantised panels (forms.h). Included once per instruction set, inside its namespace, which supplies `words` and
// what is done with them (words_*.h).
//
// Blocks of 32 inputs are summed up on their own, then scaled and added, in the order of the inputs; so an element's bits do not
// depend on how many rows and panels a tile has. Widened weights stay in registers for all rows of a tile.

// What matrices read, made ready for the arithmetic: [rows] of each. Of whole numbers, `bytes` of them for each input.
struct Prepared {
  const float* x;       // [k]
  const float* fields;  // [k]: what each half byte of a word is multiplied with, in the order of the fields
  const int8_t* q;      // [k/32][bytes][32]: scales[b] * q[b][0] are the inputs of block b, or scales[b] * (128 q[b][0] + q[b][1])
  const int32_t* starts;  // [k/32][bytes][3]: -128 times the sums of q: of inputs 0 to 15, of 16 to 31, of all
  const float* scales;  // [k/32]
  const float* sums;    // [k/32]: sums of the inputs of each block, for the minima
  size_t ldx, ldb;
};

// Half bytes are masked where they are in the word, so that the first is a number, the second 16 times a number, …, and the last
// one is shifted; inputs are divided by as much, which is exact.
constexpr int field_input(int field) { return field % 2 ? 4 + field / 2 : field / 2; }
constexpr int input_field(int input) { return input < 4 ? 2 * input : 2 * (input - 4) + 1; }
// What makes up for that, by field.
constexpr float kShare[8] = {1.0f, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1.0f};

inline void prepare_exact(const float* x, int k, float* fields, float* sums) {
  for (int i = 0; i < k; i += 8)
    for (int field = 0; field < 8; ++field) fields[i + field] = x[i + field_input(field)] * kShare[field];
  for (int b = 0; b < k / 32; ++b) sums[b] = vsum(vadd(vload(x + 32 * b), vload(x + 32 * b + 16)));
}

// The largest input of a block becomes 127, or with two bytes 127 * 128.
template <int Bytes>
inline void prepare_whole(const float* x, int k, int8_t* q, int32_t* starts, float* scales, float* sums) {
  constexpr float kMost = Bytes == 1 ? 127.0f : 127.0f * 128.0f;
  const vec magic = vset1(12582912.0f);  // 1.5 * 2^23: added, it rounds to a whole number
  for (int b = 0; b < k / 32; ++b, q += 32 * Bytes, starts += 3 * Bytes) {
    const vec in[2] = {vload(x + 32 * b), vload(x + 32 * b + 16)};
    vec largest = vzero();
    for (const vec& v : in) largest = vmax(largest, vmax(v, vsub(vzero(), v)));
    const float most = vmaximum(largest);
    const vec inverse = vset1(most > 0.0f ? kMost / most : 0.0f);
    vec whole[2];
    for (int i = 0; i < 2; ++i) {
      whole[i] = vsub(vfma(in[i], inverse, magic), magic);
      vec first = whole[i];
      if constexpr (Bytes == 2) {
        first = vsub(vfma(whole[i], vset1(0x1p-7f), magic), magic);
        narrow(q + 32 + 16 * i, vfma(first, vset1(-128.0f), whole[i]));
      }
      narrow(q + 16 * i, first);
    }
    for (int h = 0; h < Bytes; ++h) {
      int32_t* start = starts + 3 * h;
      for (int i = 0; i < 2; ++i) {
        int32_t total = 0;
        for (int j = 0; j < 16; ++j) total += q[32 * h + 16 * i + j];
        start[i] = -128 * total;
      }
      start[2] = start[0] + start[1];
    }
    // What is not a finite number makes the scale not a number.
    scales[b] = most / kMost + vsum(vmul(vadd(in[0], in[1]), vzero()));
    sums[b] = scales[b] * vsum(vadd(whole[0], whole[1]));
  }
}

inline size_t prepared_bytes(int k) { return static_cast<size_t>(k) * 4 + static_cast<size_t>(k / 32) * 32 + 64; }

inline Prepared prepare(Team& team, const SlipLinear& w, const float* x, int rows, void* memory) {
  const size_t k = w.k, blocks = k / 32;
  auto* sums = static_cast<float*>(memory);
  float* scales = sums + blocks * rows;
  auto* starts = reinterpret_cast<int32_t*>(scales + blocks * rows);
  auto* inputs = reinterpret_cast<char*>(starts + 6 * blocks * rows);
  auto* fields = reinterpret_cast<float*>(inputs);
  auto* q = reinterpret_cast<int8_t*>(inputs);
  for_each(team, rows, 4, [&](int row) {
    const float* from = x + row * k;
    float *scale = scales + row * blocks, *sum = sums + row * blocks;
    if (w.arithmetic == SLIP_EXACT) prepare_exact(from, w.k, fields + row * k, sum);
    else if (w.arithmetic == SLIP_INT8) prepare_whole<1>(from, w.k, q + row * k, starts + row * 3 * blocks, scale, sum);
    else prepare_whole<2>(from, w.k, q + row * 2 * k, starts + row * 6 * blocks, scale, sum);
  });
  return {x, fields, q, starts, scales, sums, k, blocks};
}

// f.operator()<0>() … f.operator()<N - 1>()
template <int N, int I = 0, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  if constexpr (I < N) {
    f.template operator()<I>();
    unrolled<N, I + 1>(f);
  }
}

// What belongs to a block of one panel.
template <int Form>
struct Block {
  static constexpr Layout kLayout = layout(Form);
  const uint8_t *header, *side;

  Block(const uint8_t* group, int b, int panel) : header(group + kLayout.header_at(b, panel)), side(group + kLayout.side_at(b, panel)) {}
  vec scale(int part) const {
    if constexpr (kLayout.super) return vmul(halves16(header), signed16(side + 16 * (kLayout.sixteen ? part : 0)));
    else return halves16(side);
  }
  vec minimum(vec scale) const {
    if constexpr (kLayout.minimum == Minimum::kCentred) return vmul(scale, vset1(-8.0f));
    else if constexpr (kLayout.minimum == Minimum::kZero) return vsub(vzero(), vmul(scale, halves16(side + 32)));
    else if constexpr (kLayout.super) return vsub(vzero(), vmul(halves16(header + 32), signed16(side + 16)));
    else return halves16(side + 32);
  }
};

struct Exact {
  static constexpr int kRows = kExactRows, kTileRows = 0, kMost = kRows;
  static constexpr int panels(int rows) { return kRows == 1 ? 1 : rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

  // Sums of inputs times numbers over words First … Last - 1 of a block.
  template <int Bits, int First, int Last, int R, int P>
  [[gnu::always_inline]] static void sum(const Prepared& in, int row, int b, const uint8_t* const (&at)[P], vec (&s)[R][P]) {
    const float* x = (Bits == 4 ? in.fields : in.x) + row * in.ldx + 32 * static_cast<size_t>(b);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) s[r][p] = vzero();
    constexpr int fields = 32 / Bits;
#pragma GCC unroll 1
    for (int word = First; word < Last; ++word)
      unrolled<fields>([&]<int Field>() {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const words w = load_words(at[p] + word * 64);
          vec v;
          if constexpr (Bits == 4) v = half_byte<Field>(w);
          else v = signed_byte<Field>(w);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) s[r][p] = vfma(vset1(x[r * in.ldx + word * fields + Field]), v, s[r][p]);
        }
      });
  }
  static vec scaled(const Prepared&, int, int, vec scale) { return scale; }
};

// Inputs as whole numbers of one or two bytes each. Their products with the numbers of a block, added up, are whole, too, so they
// are the same on every instruction set.
template <int Bytes, int Rows>
struct Whole {
  using Tiles = WholeTiles;
  static constexpr int kBytes = Bytes, kRows = Rows, kTileRows = Tiles::kRows, kMost = kRows > kTileRows ? kRows : kTileRows;
  static constexpr int panels(int rows) { return kRows > 1 && rows == 1 ? 4 : 1; }

  static vec joined(const vec (&of_bytes)[Bytes]) {
    if constexpr (Bytes == 1) return of_bytes[0];
    else return vfma(of_bytes[0], vset1(128.0f), of_bytes[1]);
  }

  template <int Bits, int First, int Last, int R, int P>
  [[gnu::always_inline]] static void sum(const Prepared& in, int row, int b, const uint8_t* const (&at)[P], vec (&s)[R][P]) {
    constexpr bool four = Bits == 4;
    const size_t ldx = Bytes * in.ldx;
    const int8_t* x = in.q + row * ldx + 32 * Bytes * static_cast<size_t>(b);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      std::conditional_t<four, small_sums, words> acc[R][Bytes];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < Bytes; ++h) {
          if constexpr (four) acc[r][h] = small_zero();
          else acc[r][h] = signed_zero(in.starts + ((row + r) * in.ldb + b) * 3 * Bytes + 3 * h + (Last - First == 8 ? 2 : First / 4));
        }
      unrolled<Last - First>([&]<int I>() {
        constexpr int word = First + I;
        if constexpr (four) {
          const words w = load_words(at[p] + word * 64);
          const words low = low_halves(w), high = high_halves(w);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < Bytes; ++h) {
              const int8_t* quads = x + r * ldx + 32 * h + 8 * word;
              acc[r][h] = dot_small(acc[r][h], low, quads);
              acc[r][h] = dot_small(acc[r][h], high, quads + 4);
            }
        } else {
          const signed_words w = load_signed(at[p] + word * 64);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < Bytes; ++h) acc[r][h] = dot_signed(acc[r][h], w, x + r * ldx + 32 * h + 4 * word);
        }
      });
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        vec of_bytes[Bytes];
#pragma GCC unroll 2
        for (int h = 0; h < Bytes; ++h) {
          if constexpr (four) of_bytes[h] = small_total(acc[r][h]);
          else of_bytes[h] = to_float(acc[r][h]);
        }
        s[r][p] = joined(of_bytes);
      }
    }
  }
  static vec scaled(const Prepared& in, int row, int b, vec scale) {
    return vmul(scale, vset1(in.scales[row * in.ldb + b]));
  }
};
using Int8 = Whole<1, kInt8Rows>;
using Int16 = Whole<2, kInt16Rows>;

// R rows from `row` on times P panels of a group, into out [R][4][16]. Asks for the same panels of the group at `ahead` meanwhile.
template <int Form, class Math, int R, int P>
inline void packed_tile(const uint8_t* group, const uint8_t* ahead, int panel, int blocks, const Prepared& in, int row, float* out) {
  constexpr Layout l = layout(Form);
  vec total[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) total[r][p] = vzero();
  for (int b = 0; b < blocks; ++b) {
    const uint8_t* at[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) at[p] = group + l.words_at(b, panel + p);
    if (ahead) {
#pragma GCC unroll 16
      for (int line = 0; line < P * (l.words() + l.side()); line += 64)
        __builtin_prefetch(ahead + l.block_at(b) + panel * (l.words() + l.side()) + line, 0, R > 1 ? 2 : 3);
    }
    constexpr int parts = l.sixteen ? 2 : 1, words_each = l.bits / parts;
    unrolled<parts>([&]<int Part>() {
      vec s[R][P];
      Math::template sum<l.bits, Part * words_each, (Part + 1) * words_each>(in, row, b, at, s);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        const Block<Form> block(group, b, panel + p);
        const vec scale = block.scale(Part);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[r][p] = vfma(s[r][p], Math::scaled(in, row + r, b, scale), total[r][p]);
        if constexpr (l.minimum != Minimum::kNone) {
          const vec minimum = block.minimum(scale);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) total[r][p] = vfma(minimum, vset1(in.sums[(row + r) * in.ldb + b]), total[r][p]);
        }
      }
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) vstore(out + (r * 4 + panel + p) * 16, total[r][p]);
}

// The same for panels first … last - 1 of a group.
template <int Form, class Math, int R>
static void packed_rows(const uint8_t* group, const uint8_t* ahead, int first, int last, int blocks, const Prepared& in, int row,
                        int, float* out) {
  constexpr int P = Math::panels(R);
  int panel = first;
  for (; panel + P <= last; panel += P) packed_tile<Form, Math, R, P>(group, ahead, panel, blocks, in, row, out);
  if constexpr (P > 1)
    for (; panel < last; ++panel) packed_tile<Form, Math, R, 1>(group, ahead, panel, blocks, in, row, out);
}

// The same for `height` rows, at most those of a tile of AMX: sums of whole numbers come from there.
template <int Form, class Math>
static void packed_rows_in_tiles(const uint8_t* group, const uint8_t* ahead, int first, int last, int blocks, const Prepared& in, int row,
                                 int height, float* out) {
  constexpr Layout l = layout(Form);
  constexpr int parts = l.sixteen ? 2 : 1, inputs = 32 / parts, bytes = Math::kBytes;
  const size_t ldx = bytes * in.ldx;
  Math::Tiles::shape(height, inputs);
  alignas(64) int32_t sums[bytes][Math::kTileRows][16];
  alignas(64) uint8_t wide[8 * 64];  // of 4 bits
  for (int panel = first; panel < last; ++panel) {
    for (int r = 0; r < height; ++r) vstore(out + (r * 4 + panel) * 16, vzero());
    for (int b = 0; b < blocks; ++b) {
      if (ahead) {
#pragma GCC unroll 16
        for (int line = 0; line < l.words() + l.side(); line += 64)
          __builtin_prefetch(ahead + l.block_at(b) + panel * (l.words() + l.side()) + line, 0, 2);
      }
      const uint8_t* quads = group + l.words_at(b, panel);
      if constexpr (l.bits == 4) {
        for (int word = 0; word < 4; ++word) {
          const words w = load_words(quads + word * 64);
          const words quad[2] = {low_halves(w), high_halves(w)};
          __builtin_memcpy(wide + 2 * word * 64, quad, sizeof quad);
        }
        quads = wide;
      }
      const Block<Form> block(group, b, panel);
      for (int part = 0; part < parts; ++part) {
        const int8_t* x = in.q + row * ldx + 32 * bytes * static_cast<size_t>(b) + inputs * part;
        Math::Tiles::template sum<bytes>(x, 32, ldx, quads + inputs * 16 * part, sums[0][0]);
        const vec scale = block.scale(part);
        vec minimum = vzero();
        if constexpr (l.minimum != Minimum::kNone) minimum = block.minimum(scale);
        for (int r = 0; r < height; ++r) {
          vec of_bytes[bytes];
          for (int h = 0; h < bytes; ++h) of_bytes[h] = to_float(load_words(reinterpret_cast<const uint8_t*>(sums[h][r])));
          float* at = out + (r * 4 + panel) * 16;
          vec total = vfma(Math::joined(of_bytes), Math::scaled(in, row + r, b, scale), vload(at));
          if constexpr (l.minimum != Minimum::kNone) total = vfma(minimum, vset1(in.sums[(row + r) * in.ldb + b]), total);
          vstore(at, total);
        }
      }
    }
  }
  Math::Tiles::release();
}

// What f.operator()<form>() returns.
template <class F>
inline auto of_form(int form, const F& f) {
  switch (form) {
    case kFourCentred: return f.template operator()<kFourCentred>();
    case kFour: return f.template operator()<kFour>();
    case kEight: return f.template operator()<kEight>();
    case kEightMinimum: return f.template operator()<kEightMinimum>();
    case kFourSuper: return f.template operator()<kFourSuper>();
    case kEightSuper: return f.template operator()<kEightSuper>();
    case kFourZero: return f.template operator()<kFourZero>();
    case kEightZero: return f.template operator()<kEightZero>();
    default: return f.template operator()<kEightSixteen>();
  }
}

using PackedRows = void (*)(const uint8_t*, const uint8_t*, int, int, int, const Prepared&, int, int, float*);

// Of tiles of AMX if rows are too many for registers; whole sums are the same, so the bits are.
template <class Math, int R = Math::kRows>
inline PackedRows packed_rows_of(int form, int rows) {
  if constexpr (R > 1) {
    if (rows < R) return packed_rows_of<Math, R - 1>(form, rows);
  }
  if constexpr (Math::kTileRows > 0 && R == Math::kRows) {
    if (rows > R) return of_form(form, []<int Form>() -> PackedRows { return packed_rows_in_tiles<Form, Math>; });
  }
  return of_form(form, []<int Form>() -> PackedRows { return packed_rows<Form, Math, R>; });
}

// Calls f(form, group, ahead, first, last, column) for panels first … last - 1 of every group of four, on the whole team: `column` is
// the first one's place in the matrix, and `ahead` the group at which the thread will probably go on, if there is one.
template <class F>
inline void packed_groups(Team& team, const SlipLinear& w, const F& f) {
  int items = 0;
  for (int i = 0; i < w.num_parts; ++i) items += Split(team.size(), w.parts[i].panels).items();
  team.parallel(items, [&](int item) {
    const SlipPart* part = w.parts;
    for (;; ++part) {
      const int own = Split(team.size(), part->panels).items();
      if (item < own) break;
      item -= own;
    }
    const Split split(team.size(), part->panels);
    const size_t group_bytes = layout(part->form).group(w.k);
    const int end = split.begin(item + 1);
    // The next group of the item, or the item after those of the other threads.
    const int later = split.begin(std::min(item + team.size(), split.items()));
    const auto group_of = [&](int panel) { return static_cast<const uint8_t*>(part->data) + panel / 4 * group_bytes; };
    for (int panel = split.begin(item); panel < end;) {
      const int first = panel % 4, last = std::min(first + end - panel, 4);
      const int next = panel + last - first < end ? panel + last - first : later;
      f(part->form, group_of(panel), next < part->panels ? group_of(next) : nullptr, first, last, part->first_panel + panel);
      panel += last - first;
    }
  });
}

// Hands on what rows from `row` on came to in panels first … last - 1 of a group, [height][4][16].
template <class Epilogue>
inline void finish_panels(const float* out, int row, int height, int first, int last, int column, const Epilogue& epilogue) {
  for (int r = 0; r < height; ++r, ++row) {
    int p = first;
    for (; p + 2 <= last; p += 2) {
      vec acc[2] = {vload(out + (r * 4 + p) * 16), vload(out + (r * 4 + p + 1) * 16)};
      epilogue.template operator()<2>(row, column + p - first, acc);
    }
    for (; p < last; ++p) {
      vec acc[1] = {vload(out + (r * 4 + p) * 16)};
      epilogue.template operator()<1>(row, column + p - first, acc);
    }
  }
}

// Y = X W^T, as matmul does for panels in the model's dtype.
template <class Math, class Epilogue>
inline void packed_matmul(Team& team, const SlipLinear& w, const Prepared& in, int rows, const Epilogue& epilogue) {
  const int most = rows > Math::kRows ? Math::kMost : Math::kRows, tiles = (rows + most - 1) / most;
  const int low = rows / tiles, taller = rows % tiles;  // heights of tiles: low + 1 of the first ones, low of the others
  packed_groups(team, w, [&](int form, const uint8_t* group, const uint8_t* ahead, int first, int last, int column) {
    const PackedRows kernels[2] = {packed_rows_of<Math>(form, low), packed_rows_of<Math>(form, low + (taller > 0))};
    for (int tile = 0, row = 0; tile < tiles; ++tile) {
      const int height = low + (tile < taller);
      alignas(64) float out[Math::kMost * 64];
      // The others find it in the cache.
      kernels[tile < taller](group, tile ? nullptr : ahead, first, last, w.k / 32, in, row, height, out);
      finish_panels(out, row, height, first, last, column, epilogue);
      row += height;
    }
  });
}
