// Packs the rows of quantised tensors, as they lie in GGUF files or are made of safetensors files, into the forms of forms.h, or into panels of numbers; and unpacks forms to
// floats.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "api.h"
#include "backend.h"
#include "bf16.h"

namespace {

#include "forms.h"

// 32 inputs of one row: numbers, and whatever scales and minima the form has of them.
struct Block {
  int8_t q[32];
  uint16_t scale, minimum;         // float16; the second may be a zero
  int8_t whole_scale[2], whole_minimum;
};
static_assert(sizeof(Block) == SLIP_KEPT_BYTES);

uint16_t word(const uint8_t* at) { return static_cast<uint16_t>(at[0] | at[1] << 8); }
uint32_t dword(const uint8_t* at) { return word(at) | static_cast<uint32_t>(word(at + 2)) << 16; }

// Low halves of 16 bytes, then the high ones; with a fifth bit from `fifth`, and less `centre`.
void nibbles(const uint8_t* bytes, uint32_t fifth, int centre, int8_t* q) {
  for (int i = 0; i < 32; ++i) {
    const int four = i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4;
    q[i] = static_cast<int8_t>((four | (fifth >> i & 1) << 4) - centre);
  }
}

void q4_0(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 18;
  out.scale = word(at);
  nibbles(at + 2, 0, 0, out.q);
}
void q4_1(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 20;
  out.scale = word(at), out.minimum = word(at + 2);
  nibbles(at + 4, 0, 0, out.q);
}
void q5_0(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 22;
  out.scale = word(at);
  nibbles(at + 6, dword(at + 2), 16, out.q);
}
void q5_1(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 24;
  out.scale = word(at), out.minimum = word(at + 2);
  nibbles(at + 8, dword(at + 4), 0, out.q);
}
void q8_0(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 34;
  out.scale = word(at);
  std::memcpy(out.q, at + 2, 32);
}
void int8_zero(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b) * 36;
  out.scale = word(at), out.minimum = word(at + 2);
  std::memcpy(out.q, at + 4, 32);
}

// Scale and minimum of block j of 8, of 6 bits each, from the 12 bytes that Q4_K and Q5_K keep them in.
void six_bits(const uint8_t* s, int j, Block& out) {
  const int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
  const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
  out.whole_scale[0] = static_cast<int8_t>(scale), out.whole_minimum = static_cast<int8_t>(minimum);
}
void q4_k(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b / 8) * 144;
  const int j = b % 8;
  out.scale = word(at), out.minimum = word(at + 2);
  six_bits(at + 4, j, out);
  const uint8_t* bytes = at + 16 + j / 2 * 32;
  for (int i = 0; i < 32; ++i) out.q[i] = static_cast<int8_t>(bytes[i] >> 4 * (j % 2) & 15);
}
void q5_k(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b / 8) * 176;
  const int j = b % 8;
  out.scale = word(at), out.minimum = word(at + 2);
  six_bits(at + 4, j, out);
  const uint8_t *fifth = at + 16, *bytes = at + 48 + j / 2 * 32;
  for (int i = 0; i < 32; ++i) out.q[i] = static_cast<int8_t>((bytes[i] >> 4 * (j % 2) & 15) | (fifth[i] >> j & 1) << 4);
}
void q6_k(const uint8_t* row, int b, Block& out) {
  const uint8_t* at = row + static_cast<size_t>(b / 8) * 210;
  const int half = b % 8 / 4, j = b % 4;
  const uint8_t *low = at + half * 64 + j % 2 * 32, *high = at + 128 + half * 32;
  for (int i = 0; i < 32; ++i) out.q[i] = static_cast<int8_t>(((low[i] >> j / 2 * 4 & 15) | (high[i] >> 2 * j & 3) << 4) - 32);
  out.scale = word(at + 208);
  out.whole_scale[0] = static_cast<int8_t>(at[192 + 2 * (b % 8)]), out.whole_scale[1] = static_cast<int8_t>(at[193 + 2 * (b % 8)]);
}

#include "quantise.h"

// Blocks that slip_keep has taken out.
void kept(const uint8_t* row, int b, Block& out) { std::memcpy(&out, row + static_cast<size_t>(b) * sizeof(Block), sizeof(Block)); }

struct Source {
  const char* name;
  int32_t form;
  int inputs;  // of which a row has a multiple
  void (*read)(const uint8_t*, int, Block&);
};

constexpr int inputs_of(int form) { return 32 * layout(form).blocks(); }
#define SLIP_OF_FORM(number, form)                                  \
  {"form " number, form, inputs_of(form), kept},                    \
  {"form " number " of F32", form, inputs_of(form), quantised<form, float>}, \
  {"form " number " of BF16", form, inputs_of(form), quantised<form, uint16_t>}

constexpr Source kSources[] = {
    {"Q4_0", kFourCentred, 32, q4_0},  {"Q4_1", kFour, 32, q4_1},        {"Q5_0", kEight, 32, q5_0},
    {"Q5_1", kEightMinimum, 32, q5_1}, {"Q8_0", kEight, 32, q8_0},       {"Q4_K", kFourSuper, 256, q4_k},
    {"Q5_K", kEightSuper, 256, q5_k},  {"Q6_K", kEightSixteen, 256, q6_k},
    // What safetensors files hold by groups is made blocks of (engine/checkpoint/quantised).
    {"INT4", kFourCentred, 32, q4_0},  {"INT4_ZERO", kFourZero, 32, q4_1},
    {"INT8", kEight, 32, q8_0},        {"INT8_ZERO", kEightZero, 32, int8_zero},
    // What is in no file: blocks of a form as they are kept, and numbers that become some.
    SLIP_OF_FORM("1", kFourCentred), SLIP_OF_FORM("2", kFour), SLIP_OF_FORM("3", kEight), SLIP_OF_FORM("4", kEightMinimum),
    SLIP_OF_FORM("5", kFourSuper), SLIP_OF_FORM("6", kEightSuper), SLIP_OF_FORM("7", kEightSixteen), SLIP_OF_FORM("8", kFourZero),
    SLIP_OF_FORM("9", kEightZero),
};

const Source* find(const char* name) {
  for (const Source& source : kSources)
    if (std::strcmp(source.name, name) == 0) return &source;
  return nullptr;
}

void set_half(uint8_t* at, int column, uint16_t bits) {
  at[2 * column] = static_cast<uint8_t>(bits), at[2 * column + 1] = static_cast<uint8_t>(bits >> 8);
}

void write(const Layout& l, const Block& from, uint8_t* group, int b, int panel, int column) {
  const bool second = l.second();
  uint8_t* side = group + l.side_at(b, panel);
  uint8_t* halves = l.super ? group + l.header_at(b, panel) : side;
  set_half(halves, column, from.scale);
  if (second) set_half(halves + 32, column, from.minimum);
  if (l.super) {
    side[column] = static_cast<uint8_t>(from.whole_scale[0]);
    side[16 + column] = static_cast<uint8_t>(second ? from.whole_minimum : from.whole_scale[1]);
  }
  uint8_t* words = group + l.words_at(b, panel) + column * 4;
  if (l.bits == 4) {
    for (int i = 0; i < 16; ++i) {
      const int input = i / 4 * 8 + i % 4;
      words[i / 4 * 64 + i % 4] = static_cast<uint8_t>(from.q[input] | from.q[input + 4] << 4);
    }
  } else {
    for (int quad = 0; quad < 8; ++quad) std::memcpy(words + quad * 64, from.q + 4 * quad, 4);
  }
}

// What was written.
Block read_back(const Layout& l, const uint8_t* group, int b, int panel, int column) {
  Block to{};
  const bool second = l.second();
  const uint8_t* side = group + l.side_at(b, panel);
  const uint8_t* halves = l.super ? group + l.header_at(b, panel) : side;
  to.scale = word(halves + 2 * column);
  if (second) to.minimum = word(halves + 32 + 2 * column);
  if (l.super) {
    to.whole_scale[0] = static_cast<int8_t>(side[column]);
    (second ? to.whole_minimum : to.whole_scale[1]) = static_cast<int8_t>(side[16 + column]);
  }
  const uint8_t* words = group + l.words_at(b, panel) + column * 4;
  if (l.bits == 4) {
    for (int i = 0; i < 32; ++i) to.q[i] = static_cast<int8_t>(words[i / 8 * 64 + i % 4] >> i / 4 % 2 * 4 & 15);
  } else {
    for (int quad = 0; quad < 8; ++quad) std::memcpy(to.q + 4 * quad, words + quad * 64, 4);
  }
  return to;
}

// The numbers that a block stands for.
void numbers(const Layout& l, const Block& from, float* out) {
  const bool stored = l.minimum == Minimum::kStored;
  const float zero = l.minimum == Minimum::kCentred ? 8.0f : l.minimum == Minimum::kZero ? half_to_float(from.minimum) : 0.0f;
  float scale[2], minimum = stored ? half_to_float(from.minimum) : 0.0f;
  scale[0] = scale[1] = half_to_float(from.scale);
  if (l.super) {
    scale[1] *= static_cast<float>(from.whole_scale[l.sixteen]);
    scale[0] *= static_cast<float>(from.whole_scale[0]);
    minimum = -(minimum * static_cast<float>(from.whole_minimum));
  }
  for (int i = 0; i < 32; ++i) out[i] = scale[i / 16] * (static_cast<float>(from.q[i]) - zero);
  if (stored)
    for (int i = 0; i < 32; ++i) out[i] += minimum;
}

float same(float x) { return x; }

// Rows into panels of numbers (api.h). Those of a panel together, block by block, so that whole lines of memory are written.
template <class Elem, int Pair, Elem (*Narrow)(float)>
void fill_panels(const Source& source, const uint8_t* rows, int64_t row_bytes, int count, Elem* panels, int k, int first_row,
                 int first_panel, int stride) {
  const Layout l = layout(source.form);
  Block block{};
  float out[32];
  Elem narrowed[32];
  for (int i = 0, some; i < count; i += some) {
    const int row = first_row + i, lane = row % 16, panel = first_panel + stride * (row / 16);
    some = std::min(16 - lane, count - i);
    Elem* first = panels + static_cast<size_t>(panel / 4) * 64 * k + (panel % 4 * 16 + lane) * Pair;
    for (int b = 0; b < k / 32; ++b) {
      for (int r = 0; r < some; ++r) {
        source.read(rows + (i + r) * row_bytes, b, block);
        numbers(l, block, out);
        Elem* at = first + static_cast<size_t>(b) * 32 * 64 + r * Pair;
        for (int j = 0; j < 32; ++j) narrowed[j] = Narrow(out[j]);
        for (int j = 0; j < 32; j += Pair) std::memcpy(at + j * 64, narrowed + j, Pair * sizeof(Elem));
      }
    }
  }
}

// Where row `row` of a matrix is in a part: `first_panel` has its first 16 rows, and each `stride` further the next ones.
struct Column {
  uint8_t* group;
  int panel, column;  // in the group, in the panel

  Column(const SlipPart& part, const Layout& l, int k, int64_t row, int first_panel, int stride) {
    const auto at = static_cast<int>(first_panel + stride * (row / 16));
    group = static_cast<uint8_t*>(const_cast<void*>(part.data)) + at / 4 * l.group(k);
    panel = at % 4, column = static_cast<int>(row % 16);
  }
};

// So many numbers are packed by all threads: those of a model that is loaded. Others come while steps run, which have the threads then.
constexpr int64_t kShared = 1 << 22;

}  // namespace

namespace slip {

void unpack_column(int form, const uint8_t* group, int panel, int column, int k, float* out) {
  const Layout l = layout(form);
  for (int b = 0; b < k / 32; ++b) numbers(l, read_back(l, group, b, panel, column), out + 32 * b);
}

}  // namespace slip

extern "C" {

int32_t slip_form(const char* format, int32_t k) {
  const Source* source = find(format);
  return source && k % source->inputs == 0 ? source->form : 0;
}

int64_t slip_part_bytes(int32_t form, int32_t panels, int32_t k) {
  return static_cast<int64_t>((panels + 3) / 4) * static_cast<int64_t>(layout(form).group(k));
}

void slip_pack(const char* format, const uint8_t* rows, int64_t row_bytes, int32_t count, const SlipPart* part, int32_t k,
               int32_t first_row, int32_t first_panel, int32_t stride) {
  const Source& source = *find(format);
  const Layout l = layout(source.form);
  const auto pack = [&](int row) {
    Block block{};
    const Column at(*part, l, k, first_row + row, first_panel, stride);
    for (int b = 0; b < k / 32; ++b) {
      source.read(rows + row * row_bytes, b, block);
      write(l, block, at.group, b, at.panel, at.column);
    }
  };
  if (static_cast<int64_t>(count) * k < kShared) {
    for (int row = 0; row < count; ++row) pack(row);
    return;
  }
  slip::Pass pass(slip::team());
  slip::team().parallel((count + 15) / 16, [&](int some) {
    for (int row = 16 * some; row < std::min(16 * some + 16, count); ++row) pack(row);
  });
}

void slip_dequantise(const char* format, const uint8_t* rows, int64_t row_bytes, int32_t count, int32_t dtype, void* panels,
                     int32_t k, int32_t first_row, int32_t first_panel, int32_t stride) {
  const Source& source = *find(format);
  if (dtype == SLIP_BF16)
    fill_panels<uint16_t, 2, slip::bf16_of>(source, rows, row_bytes, count, static_cast<uint16_t*>(panels), k, first_row,
                                            first_panel, stride);
  else
    fill_panels<float, 1, same>(source, rows, row_bytes, count, static_cast<float*>(panels), k, first_row, first_panel, stride);
}

void slip_unpack(const SlipPart* part, int32_t k, const int64_t* rows, int32_t count, int32_t first_panel, int32_t stride,
                 float* out) {
  const Layout l = layout(part->form);
  for (int i = 0; i < count; ++i) {
    const Column at(*part, l, k, rows[i], first_panel, stride);
    slip::unpack_column(part->form, at.group, at.panel, at.column, k, out + static_cast<size_t>(i) * k);
  }
}

void slip_keep(const SlipPart* part, int32_t k, const int64_t* rows, int32_t count, int32_t first_panel, int32_t stride,
               uint8_t* out) {
  const Layout l = layout(part->form);
  for (int i = 0; i < count; ++i) {
    const Column at(*part, l, k, rows[i], first_panel, stride);
    for (int b = 0; b < k / 32; ++b, out += sizeof(Block)) {
      const Block block = read_back(l, at.group, b, at.panel, at.column);
      std::memcpy(out, &block, sizeof(block));
    }
  }
}
}
