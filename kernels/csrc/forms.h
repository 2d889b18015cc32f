// How quantised weights lie in memory: what packing writes and every instruction set reads. Included inside a namespace of each, for
// units that are compiled for different instruction sets must not share code.
//
// The types of GGUF files, and those that quantised safetensors files are made blocks of, become a few forms, without a bit of the
// numbers they stand for being lost. A weight is scale * q + minimum; q is 4 bits without or 8 bits with a sign; scale and minimum
// belong to 32 inputs of one output, the scale of one form to 16. They are float16 as in the file, or, as in the file too, whole
// numbers times a float16 per 256 inputs; or the minimum is a whole number, the zero, times the scale, which float32 has exactly.
//
//   form                  from            bits  scale per   minimum
//   kFourCentred          Q4_0, INT4      4     32          -8 * scale
//   kFour                 Q4_1            4     32          of its own
//   kEight                Q5_0, Q8_0,     8     32          none
//                         INT8
//   kEightMinimum         Q5_1            8     32          of its own
//   kFourSuper            Q4_K            4     32 of 256   of its own
//   kEightSuper           Q5_K            8     32 of 256   of its own
//   kEightSixteen         Q6_K            8     16 of 256   none
//   kFourZero             INT4_ZERO       4     32          -zero * scale, with a zero of its own
//   kEightZero            INT8_ZERO       8     32          the same
//
// A part is some panels (api.h) of one form, in groups of four that are read as one stream, the last group filled up with zeros. A
// group is a row of units: of a block of 32 inputs, or of a header and the 8 blocks of 256 inputs. Whatever a unit has, it has of
// the four panels behind each other, so that everything but what belongs to one panel begins at a multiple of 64 bytes:
//
//   header   float16 [16] scales, then float16 [16] minima if there are any (forms with "Super" and "Sixteen" only)
//   block    side: float16 [16] scales, then float16 [16] minima, or zeros, if there are any;
//              with a header int8 [16] of the scales, then int8 [16] of the minima, or of the scales of inputs 16 to 31
//            words, of 4 bits: [4 octets of inputs][16 columns] of 32 bits: byte b has input b in its low half, 4 + b in the high one
//              of 8 bits: [8 quads of inputs][16 columns] of 32 bits: byte b is input b

enum Form : int32_t {
  kFourCentred = 1, kFour, kEight, kEightMinimum, kFourSuper, kEightSuper, kEightSixteen, kFourZero, kEightZero, kForms
};

enum class Minimum { kNone, kStored, kCentred, kZero };

struct Layout {
  int bits;
  bool super;
  Minimum minimum;
  bool sixteen;

  // Whether there is a second float16: a minimum, or a zero, which is a whole number.
  constexpr bool second() const { return minimum == Minimum::kStored || minimum == Minimum::kZero; }
  // Bytes of one panel.
  constexpr int header() const { return !super ? 0 : second() ? 64 : 32; }
  constexpr int side() const { return super || !second() ? 32 : 64; }
  constexpr int words() const { return 64 * bits; }
  // Of four.
  constexpr int blocks() const { return super ? 8 : 1; }
  constexpr int block() const { return 4 * (side() + words()); }
  constexpr int unit() const { return 4 * header() + blocks() * block(); }
  constexpr size_t group(int k) const { return static_cast<size_t>(k / 32 / blocks()) * unit(); }
  // Where block b of one panel is, from the group's begin.
  constexpr size_t header_at(int b, int panel) const { return static_cast<size_t>(b / blocks()) * unit() + panel * header(); }
  constexpr size_t block_at(int b) const {
    return static_cast<size_t>(b / blocks()) * unit() + 4 * header() + static_cast<size_t>(b % blocks()) * block();
  }
  constexpr size_t side_at(int b, int panel) const { return block_at(b) + panel * side(); }
  constexpr size_t words_at(int b, int panel) const { return block_at(b) + 4 * side() + panel * words(); }
};

constexpr Layout layout(int form) {
  switch (form) {
    case kFourCentred: return {4, false, Minimum::kCentred, false};
    case kFour: return {4, false, Minimum::kStored, false};
    case kEight: return {8, false, Minimum::kNone, false};
    case kEightMinimum: return {8, false, Minimum::kStored, false};
    case kFourSuper: return {4, true, Minimum::kStored, false};
    case kEightSuper: return {8, true, Minimum::kStored, false};
    case kFourZero: return {4, false, Minimum::kZero, false};
    case kEightZero: return {8, false, Minimum::kZero, false};
    default: return {8, true, Minimum::kNone, true};
  }
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 0xffu << 23 : (exponent + 112) << 23) | fraction << 13;
  return __builtin_bit_cast(float, bits);
}
