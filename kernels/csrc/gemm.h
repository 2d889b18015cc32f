// Rows times panels: the one matrix micro-kernel. Included once per instruction set, inside its namespace.

// f(0) … f(count - 1), `grain` of them at a time.
template <class F>
inline void for_each(Team& team, int count, int grain, const F& f) {
  team.parallel((count + grain - 1) / grain, [&](int item) {
    for (int i = item * grain; i < std::min((item + 1) * grain, count); ++i) f(i);
  });
}

constexpr int kGroup = 4;          // panels of a weight matrix that lie interleaved (api.h)
constexpr int kSoonBytes = 4096;  // how far ahead of its reading a single tile asks for memory

template <int R, int P>
[[gnu::always_inline]] inline void clear(vec (&acc)[R][P]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[r][p] = vzero();
}

// acc += rows of x times panels, whose vectors are Stride apart. With Ahead > 0, asks for so many lines of memory per step,
// from `ahead` on: for the first-level cache if it is soon, else for the second.
template <class D, int R, int P, int Stride, int Ahead = 0, bool Soon = false>
[[gnu::always_inline]] inline void accumulate(const typename D::row* x, size_t ldx, const typename D::elem* const* panels,
                                              int steps, vec (&acc)[R][P], const char* ahead = nullptr) {
  const auto part = [&]<int Part>(int k) __attribute__((always_inline)) {
    const auto load = [&](int p) { return D::template load<Part>(panels[p] + static_cast<size_t>(k) * Stride * 16 * D::kPair); };
    if constexpr (R == 1) {  // each vector is used at once, so few registers are needed
      const typename D::xvec xr = D::broadcast(x + static_cast<size_t>(k) * D::kPair + Part);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[0][p] = D::dot(acc[0][p], xr, load(p));
      return;
    }
    typename D::wvec w[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) w[p] = load(p);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename D::xvec xr = D::broadcast(x + r * ldx + static_cast<size_t>(k) * D::kPair + Part);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[r][p] = D::dot(acc[r][p], xr, w[p]);
    }
  };
  for (int k = 0; k < steps; ++k) {
#pragma GCC unroll 4
    for (int line = 0; line < Ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, Soon ? 3 : 2);
    part.template operator()<0>(k);
    if constexpr (D::kParts == 2) part.template operator()<1>(k);
  }
}

// R rows times P panels, as many of them at a time as there are registers for. Not part of its callers, which differ in what
// becomes of the results only: it is most of what there is to compile.
template <class D, int R, int P, int Ahead, bool Soon>
[[gnu::noinline]] void row_tile(const typename D::row* x, size_t ldx, const typename D::elem* const* panels, int steps,
                                const char* ahead, vec (*out)[P]) {
  constexpr int W = std::min(tile_panels(R), P);
#pragma GCC unroll 1
  for (int p = 0; p < P; p += W, ahead += static_cast<size_t>(Ahead) * steps * 64) {
    vec acc[R][W];
    clear(acc);
    accumulate<D, R, W, kGroup, Ahead, Soon>(x, ldx, panels + p, steps, acc, ahead);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < W; ++i) out[r][p + i] = acc[r][i];
  }
}

template <int P, class Epilogue>
[[gnu::noinline]] void finish_rows(int begin, int end, int panel, vec (*acc)[P], const Epilogue& epilogue) {
  for (int row = begin; row < end; ++row) epilogue.template operator()<P>(row, panel, acc[row - begin]);
}

// Calls f<height>(row).
template <int R = kMaxRows, class F>
inline void tile_of(int height, int row, const F& f) {
  if constexpr (R > 1) {
    if (height < R) return tile_of<R - 1>(height, row, f);
  }
  f.template operator()<R>(row);
}

// Calls f<R>(first_row) over `rows` rows in tiles of nearly equal height, at most kMaxRows.
template <class F>
inline void for_row_tiles(int rows, const F& f) {
  const int tiles = (rows + kMaxRows - 1) / kMaxRows;
  for (int t = 0, row = 0; t < tiles; ++t) {
    const int height = rows / tiles + (t < rows % tiles);
    tile_of(height, row, f);
    row += height;
  }
}

// The same where the processor multiplies tiles: each is 16 rows times a panel, two tiles of rows times two panels at a time. Few rows
// are multiplied with all panels, which are asked for a little ahead; else pairs of panels stay in the first-level cache for all
// rows, and the first of these share the asking for the group at `next`.
template <class D, int P, class Epilogue>
inline void tile_group(const typename D::row* x, size_t ldx, int rows, const typename D::elem* first, int k, int panel,
                       const typename D::elem* next, const Epilogue& epilogue) {
  constexpr int kPanel = 16 * D::kPair;
  if (rows <= D::kTileRows) {
    vec acc[D::kTileRows][P];
    const char* soon = reinterpret_cast<const char*>(first) + kSoonBytes;
    D::template multiply<P>(x, ldx, rows, first, k, P == kGroup ? soon : nullptr, acc);
    return finish_rows(0, rows, panel, acc, epilogue);
  }
  constexpr int W = std::min(P, 2);
  const int blocks = (rows + 2 * D::kTileRows - 1) / (2 * D::kTileRows);
  vec acc[2 * D::kTileRows][W];
  for (int p = 0; p < P; p += W) {
    const char* ahead = next ? reinterpret_cast<const char*>(next + p * kPanel) : nullptr;
    for (int i = 0, row = 0; i < blocks; ++i) {
      const int height = rows / blocks + (i < rows % blocks);
      D::template multiply<W>(x + row * ldx, ldx, height, first + p * kPanel, k, i ? nullptr : ahead, acc);
      finish_rows(row, row + height, panel + p, acc, epilogue);
      row += height;
    }
  }
}

// P panels from `first` on times all rows, tile after tile.
//
// Arithmetic and memory take turns unless memory is asked for early. One tile as wide as the group asks for the lines a little
// further on in it, at the pace at which it reads; the hardware does that for one row. Otherwise only the first sweep over the
// group reads memory, so all of them share the asking for the group at `next`, where this thread will go on.
template <class D, int P, class Epilogue>
inline void panel_group(const typename D::row* x, size_t ldx, int rows, const typename D::elem* first, int k, int panel,
                        const typename D::elem* next, const Epilogue& epilogue) {
  if constexpr (D::kTiles) return tile_group<D, P>(x, ldx, rows, first, k, panel, next, epilogue);
  const typename D::elem* panels[P];
  for (int p = 0; p < P; ++p) panels[p] = first + p * 16 * D::kPair;
  const int steps = k / D::kPair;
  constexpr bool whole = P == kGroup;
  const bool few = rows <= kGroup / 2 * kMaxRows;  // then each tile has more to ask for
  const char* ahead = reinterpret_cast<const char*>(next);
  const char* end = ahead + static_cast<size_t>(kGroup) * steps * 64;
  vec acc[kMaxRows][P];
  for_row_tiles(rows, [&]<int R>(int row) {
    constexpr int W = std::min(tile_panels(R), P);
    const auto tile = [&]<int Ahead, bool Soon = false>(const char* from) {
      row_tile<D, R, P, Ahead, Soon>(x + row * ldx, ldx, panels, steps, from, acc);
      ahead += static_cast<size_t>(Ahead) * (P / W) * steps * 64;
    };
    if (!whole || rows == 1) tile.template operator()<0>(nullptr);
    else if (W == kGroup && R == rows) tile.template operator()<kGroup, true>(reinterpret_cast<const char*>(first) + kSoonBytes);
    else if (!next || ahead >= end) tile.template operator()<0>(nullptr);
    else if (W < kGroup) tile.template operator()<W>(ahead);  // for all of it
    else if (few) tile.template operator()<kGroup / 2>(ahead);
    else tile.template operator()<1>(ahead);
    finish_rows(row, row + R, panel, acc, epilogue);
  });
}

// How a loop over groups of panels is split into items: large ones while there is much to do, then single groups, and
// what the threads cannot share evenly in pairs of panels, so that they end together.
struct Split {
  int threads, panels, grain, large, small;

  Split(int threads, int panels) : threads(threads), panels(panels) {
    const int groups = panels / kGroup;
    grain = std::max(groups / (threads * 16), 1);
    large = groups / (threads * grain) * threads;
    small = (groups - large * grain) / threads * threads;
  }
  int first_pair() const { return (large * grain + small) * kGroup; }
  int items() const { return large + small + (panels - first_pair() + 1) / 2; }
  // The panels of an item end where the next one's begin.
  int begin(int item) const {
    if (item <= large) return item * grain * kGroup;
    if (item <= large + small) return (large * grain + item - large) * kGroup;
    return std::min(first_pair() + 2 * (item - large - small), panels);
  }
};

// Y = X W^T on the whole team. epilogue.operator()<P>(row, first_panel, acc[P]) consumes the results.
template <class D, class Epilogue>
inline void matmul(Team& team, const SlipLinear& w, const typename D::row* x, size_t ldx, int rows,
                   const Epilogue& epilogue) {
  const auto* base = static_cast<const typename D::elem*>(w.panels);
  const Split split(team.size(), w.n / 16);
  auto at = [&](int panel) {
    return base + static_cast<size_t>(panel / kGroup) * kGroup * 16 * w.k + panel % kGroup * 16 * D::kPair;
  };
  team.parallel(split.items(), [&](int item) {
    const int end = split.begin(item + 1);
    // Where this thread will probably go on: the next group of its item, or the item after those of the other threads.
    const int later = split.begin(std::min(item + team.size(), split.items()));
    int panel = split.begin(item);
    for (; panel + kGroup <= end; panel += kGroup) {
      const int next = panel + 2 * kGroup <= end ? panel + kGroup : later;
      panel_group<D, kGroup>(x, ldx, rows, at(panel), w.k, panel, next < split.panels ? at(next) : nullptr, epilogue);
    }
    for (; panel + 2 <= end; panel += 2) panel_group<D, 2>(x, ldx, rows, at(panel), w.k, panel, nullptr, epilogue);
    for (; panel < end; ++panel) panel_group<D, 1>(x, ldx, rows, at(panel), w.k, panel, nullptr, epilogue);
  });
}

// Epilogues ------------------------------------------------------------------------------------------------------

struct StoreRows {  // out[row, col] = acc + bias, for the columns that exist
  float* out;
  size_t ld;
  int columns;
  const float* bias;
  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    for (int p = 0; p < P; ++p) {
      const int col = (panel + p) * 16;
      const vec y = bias ? vadd(acc[p], vload(bias + col)) : acc[p];
      if (col + 16 <= columns) {
        vstore(out + row * ld + col, y);
      } else if (col < columns) {
        float lanes[16];
        vstore(lanes, y);
        for (int i = 0; col + i < columns; ++i) out[row * ld + col + i] = lanes[i];
      }
    }
  }
};

struct AddRows {  // out[row, col] += acc + bias
  float* out;
  size_t ld;
  const float* bias;
  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    for (int p = 0; p < P; ++p) {
      const int col = (panel + p) * 16;
      const vec y = bias ? vadd(acc[p], vload(bias + col)) : acc[p];
      float* at = out + row * ld + col;
      vstore(at, vadd(vload(at), y));
    }
  }
};

template <class D>
struct SiluMulRows {  // panels alternate gate, up: out = silu(gate) * up, rounded to D
  typename D::row* out;
  size_t ld;
  const float* bias;
  template <int P>
  void operator()(int row, int panel, vec (&acc)[P]) const {
    if constexpr (P % 2 == 0) {
      for (int p = 0; p < P; p += 2) {
        vec gate = acc[p], up = acc[p + 1];
        if (bias) {
          gate = vadd(gate, vload(bias + (panel + p) * 16));
          up = vadd(up, vload(bias + (panel + p + 1) * 16));
        }
        const vec sigmoid = vdiv(vset1(1.0f), vadd(vset1(1.0f), vexp(vsub(vzero(), gate))));
        D::store(out + row * ld + (panel + p) / 2 * 16, vmul(vmul(gate, sigmoid), up));
      }
    }
  }
};
