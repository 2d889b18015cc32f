#define SLIP_ISA avx512amx
#define SLIP_BACKEND kAvx512Amx
#define SLIP_OWN_BF16
#define SLIP_OWN_WORDS
#define SLIP_TILES
#include "vec_avx512amx.h"
#include "words_avx512.h"

#include "isa.h"

namespace slip {

// Whether tiles compute what they should: whole numbers, so that nothing is rounded, in shapes of all kinds.
bool tiles_are_right() {
  using avx512amx::Bf16, avx512amx::vec;
  constexpr int kRows = 21, kInputs = 44;
  alignas(64) static Bf16::row x[kRows][kInputs];
  alignas(64) static Bf16::elem panels[kInputs / 2][4][16][2];
  const auto number = [](int i) { return static_cast<float>((i * 7 + i / 5) % 13 - 6); };
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kInputs; ++i) x[r][i] = bf16_of(number(r * kInputs + i));
  for (int i = 0; i < kInputs * 64; ++i) panels[0][0][0][i] = bf16_of(number(3 * i + 1));
  const auto is_right = [&]<int P>(int rows) {
    alignas(64) vec out[2 * Bf16::kTileRows][P];
    Bf16::multiply<P>(x[0], kInputs, rows, panels[0][0][0], kInputs, nullptr, out);
    for (int r = 0; r < rows; ++r)
      for (int column = 0; column < 16 * P; ++column) {
        float sum = 0.0f;
        for (int i = 0; i < kInputs; ++i)
          sum += bf16_to_float(x[r][i]) * bf16_to_float(panels[i / 2][column / 16][column % 16][i % 2]);
        if (sum != reinterpret_cast<const float*>(out[r])[column]) return false;
      }
    return true;
  };
  alignas(64) static int8_t in[16][2][32], bytes[8][16][4];
  alignas(64) int32_t sums[2][16][16];
  for (int i = 0; i < 1024; ++i) in[0][0][i] = static_cast<int8_t>(i * 37 % 255 - 127);
  for (int i = 0; i < 512; ++i) bytes[0][0][i] = static_cast<int8_t>(i * 91 % 256 - 128);
  avx512amx::WholeTiles::shape(13, 32);
  avx512amx::WholeTiles::sum<2>(in[0][0], 32, 64, reinterpret_cast<const uint8_t*>(bytes), sums[0][0]);
  avx512amx::WholeTiles::release();
  for (int i = 0; i < 2 * 13 * 16; ++i) {
    const int h = i / 16 / 13, r = i / 16 % 13, column = i % 16;
    int sum = 0;
    for (int k = 0; k < 32; ++k) sum += in[r][h][k] * bytes[k / 4][column][k % 4];
    if (sum != sums[h][r][column]) return false;
  }
  return is_right.operator()<4>(1) && is_right.operator()<4>(16) && is_right.operator()<2>(kRows) && is_right.operator()<1>(17);
}

}  // namespace slip
