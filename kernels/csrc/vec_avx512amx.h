// Products of bfloat16, and of whole numbers, by the tiles of AMX (Intel, from Sapphire Rapids on); everything else as with AVX-512 BF16.
#pragma once
#include "vec_avx512bf16.h"

namespace slip::SLIP_ISA {

// What LDTILECFG reads: how many rows, of how many bytes, each of the eight tiles has.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void use_shapes(const TileShapes& shapes) {
  // What was written is in memory from here on: compilers do not know how much is read of it.
  asm volatile("" ::"r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

// Rows of whole numbers times those of a panel, for packed.h.
struct WholeTiles {
  static constexpr int kRows = 16;

  // Tiles 0 and 1 are sums, 4 and 5 rows, 6 a panel.
  static void shape(int rows, int inputs) {
    TileShapes shapes;
    for (int i = 0; i < 2; ++i) {
      shapes.rows[i] = shapes.rows[4 + i] = static_cast<uint8_t>(rows);
      shapes.bytes[i] = 64, shapes.bytes[4 + i] = static_cast<uint16_t>(inputs);
    }
    shapes.rows[6] = static_cast<uint8_t>(inputs / 4), shapes.bytes[6] = 64;
    use_shapes(shapes);
  }
  static void release() { _tile_release(); }

  // out [Bytes][kRows][16] = products; the second byte of an input is `apart` behind the first, the next row's ldx.
  template <int Bytes>
  [[gnu::always_inline]] static void sum(const int8_t* x, size_t apart, size_t ldx, const uint8_t* panel, int32_t* out) {
    asm volatile("" ::"r"(panel) : "memory");  // it may just have been written
    _tile_loadd(6, panel, 64);
    _tile_zero(0);
    _tile_loadd(4, x, ldx);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, out, 64);
    if constexpr (Bytes == 2) {
      _tile_zero(1);
      _tile_loadd(5, x + apart, ldx);
      _tile_dpbssd(1, 5, 6);
      _tile_stored(1, out + kRows * 16, 64);
    }
    asm volatile("" ::"r"(out) : "memory");
  }
};

// An element of a product is summed up 32 inputs at a time, in the order of the inputs, whatever the shapes; so a row has the same bits
// with any others.
struct Bf16 : VectorBf16 {
  static constexpr bool kTiles = true;
  static constexpr int kTileRows = 16, kTileInputs = 32;
  static constexpr size_t kStep = 4 * 16 * kPair;  // from a pair of inputs to the next in a group of four panels (api.h)

  // Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 panels. Up to 16 rows are one tile, times P panels; more are two, times P panels
  // at the most two.
  static void shape(int rows) {
    TileShapes shapes;
    const int lower = rows > kTileRows ? rows / 2 : 0, upper = rows - lower;
    for (int i = 0; i < 8; ++i) shapes.bytes[i] = 64;
    for (int i = 0; i < 4; ++i) shapes.rows[i] = static_cast<uint8_t>(lower && i >= 2 ? lower : upper);
    shapes.rows[4] = static_cast<uint8_t>(upper), shapes.rows[5] = static_cast<uint8_t>(lower ? lower : upper);
    shapes.rows[6] = shapes.rows[7] = kTileInputs / kPair;
    use_shapes(shapes);
  }

  static void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // What was written before is in memory from here on: compilers do not know that tiles are loaded from it, nor how much.
  static void written(const void* at) { asm volatile("" ::"r"(at) : "memory"); }

  // 32 inputs of the rows times those of P panels that are a group's.
  template <int P>
  [[gnu::always_inline]] static void step(const row* upper, const row* lower, size_t ldx, const elem* w) {
    constexpr int kPanel = 16 * kPair;
    _tile_loadd(4, upper, ldx * sizeof(row));
    _tile_loadd(6, w, kStep * sizeof(elem));
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P > 1) {
      _tile_loadd(7, w + kPanel, kStep * sizeof(elem));
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (P > 2) {
      _tile_loadd(6, w + 2 * kPanel, kStep * sizeof(elem));
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, w + 3 * kPanel, kStep * sizeof(elem));
      _tile_dpbf16ps(3, 4, 7);
    } else if (lower) {
      _tile_loadd(5, lower, ldx * sizeof(row));
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }

  // out = up to 16 rows, or 32 where P is 1 or 2, times P panels of a group, from `first` on. Asks for as many lines as it reads of them,
  // from `ahead` on.
  template <int P>
  [[gnu::noinline]] static void multiply(const row* x, size_t ldx, int rows, const elem* first, int k, const char* ahead, vec (*out)[P]) {
    const int lower = rows > kTileRows ? rows / 2 : 0, upper = rows - lower;
    const row* second = lower ? x + upper * ldx : nullptr;
    shape(rows);
    written(x);
    clear_sums();
    const int whole = k / kTileInputs * kTileInputs;
    for (int i = 0; i < whole; i += kTileInputs, first += kTileInputs / kPair * kStep) {
      if (ahead) {
        for (int pair = 0; pair < kTileInputs / kPair; ++pair, ahead += kStep * sizeof(elem))
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) __builtin_prefetch(ahead + p * 64, 0, 2);
      }
      step<P>(x + i, second ? second + i : nullptr, ldx, first);
    }
    if (whole < k) {  // the rest, filled up with zeros
      alignas(64) row in[2 * kTileRows][kTileInputs] = {};
      alignas(64) elem panels[kTileInputs / kPair][kStep] = {};
      for (int r = 0; r < rows; ++r) __builtin_memcpy(in[r], x + r * ldx + whole, (k - whole) * sizeof(row));
      for (int pair = 0; pair < (k - whole) / kPair; ++pair)
        __builtin_memcpy(panels[pair], first + pair * kStep, P * 16 * kPair * sizeof(elem));
      written(in);
      written(panels);
      step<P>(in[0], lower ? in[upper] : nullptr, kTileInputs, panels[0]);
    }
    constexpr size_t kRow = P * sizeof(vec);
    _tile_stored(0, out[0], kRow);
    if constexpr (P > 1) _tile_stored(1, out[0] + 1, kRow);
    if constexpr (P > 2) {
      _tile_stored(2, out[0] + 2, kRow);
      _tile_stored(3, out[0] + 3, kRow);
    } else if (lower) {
      _tile_stored(2, out[upper], kRow);
      if constexpr (P > 1) _tile_stored(3, out[upper] + 1, kRow);
    }
    _tile_release();  // others who run on this thread have shapes of their own
  }

  // Products in tiles, nothing else; returns how many operations that was.
  static double multiply_in_tiles(int64_t times) {
    alignas(64) const row in[2 * kTileRows][kTileInputs] = {};
    alignas(64) const elem panel[kTileInputs / kPair][16 * kPair] = {};
    shape(2 * kTileRows);
    written(in);
    written(panel);
    clear_sums();
    _tile_loadd(4, in[0], 64);
    _tile_loadd(5, in[kTileRows], 64);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel, 64);
    for (int64_t i = 0; i < times; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 4 * kTileRows * 16 * kTileInputs * static_cast<double>(times);
  }
};

}  // namespace slip::SLIP_ISA
