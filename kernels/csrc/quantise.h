// Numbers become blocks of the forms of forms.h, as nearly as a form can have them: of 8 bits all are used, whatever the file had.
// Included by pack.cpp, inside its namespace.

// The nearest float16 of a number that is not negative, of two the even one.
uint16_t half_of_size(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return 0x7e00;
  if (bits >= 0x477ff000) return 0x7bff;  // the largest; what is larger cannot be kept in such a form
  if (bits < 0x38800000)  // whole multiples of 2^-24; what is added rounds to them
    return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f));
  return static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
uint16_t half_of(float x) { return static_cast<uint16_t>(half_of_size(std::fabs(x)) | (x < 0.0f ? 0x8000 : 0)); }

float inverse_of(float scale) { return scale != 0.0f ? 1.0f / scale : 0.0f; }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added, it rounds to a whole number, which then stands in the low bits

// 32 numbers times `inverse`, plus `offset`, as whole numbers from `least` to `most`. In loops that compilers make vectors of.
void whole_numbers(const float* x, int count, float inverse, float offset, float least, float most, int8_t* q) {
  for (int i = 0; i < count; ++i) {
    float whole = x[i] * inverse + offset;
    whole = whole > most ? most : whole;
    whole = whole < least ? least : whole;
    q[i] = static_cast<int8_t>(__builtin_bit_cast(int32_t, whole + kMagic));
  }
}

float largest(const float* x, int count) {
  int32_t most = 0;  // as bits, which are in the order of what they stand for
  for (int i = 0; i < count; ++i) most = std::max(most, __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff);
  return __builtin_bit_cast(float, most);
}

struct Range {
  float low, high;
};
Range range(const float* x) {
  Range found{x[0], x[0]};
  for (int i = 1; i < 32; ++i) {
    found.low = x[i] < found.low ? x[i] : found.low;
    found.high = x[i] > found.high ? x[i] : found.high;
  }
  return found;
}

// Scale and lowest number of a block of 4 bits are looked for: those by which its numbers just fit leave a fifth more of them lost
// than others by which a few are cut off, or the steps are not all used. Eight numbers at once, with the same sums on every processor.
using Eight = float __attribute__((vector_size(32)));
constexpr int kFits = 9;
constexpr float kFirstFit = -1.2f, kNextFit = 0.25f;  // steps more than 15 between the lowest and the highest number
// Off by less than this share of a step they came from such a block, which is to be the same again.
constexpr float kSame = 1.0f / 64.0f;

float sum_of(const Eight& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

struct Line {
  float scale, lowest;
  float lost = 0.0f;  // the sum of squares of what 32 numbers are off, less the sum of their squares
};

// Where the system chooses among functions when it loads them.
#if defined(__x86_64__) && defined(__GLIBC__)
#define SLIP_EIGHT_AT_ONCE __attribute__((target_clones("avx2", "default")))
#else
#define SLIP_EIGHT_AT_ONCE
#endif

// The line that is nearest to 32 numbers, whose sum is `total`, in the places that they take on another one.
SLIP_EIGHT_AT_ONCE void nearest_line(const float* x, float total, float inverse, float offset, Line* found) {
  Eight q{}, qq{}, qx{};
  for (int i = 0; i < 32; i += 8) {
    Eight numbers;
    std::memcpy(&numbers, x + i, sizeof(numbers));
    Eight whole = numbers * inverse + offset;
    whole = whole > 15.0f ? Eight{} + 15.0f : whole;
    whole = whole < 0.0f ? Eight{} : whole;
    whole = (whole + kMagic) - kMagic;
    q += whole, qq += whole * whole, qx += whole * numbers;
  }
  const float places = sum_of(q), product = sum_of(qx);
  const float spread = 32.0f * sum_of(qq) - places * places;
  const float scale = spread > 0.0f ? (32.0f * product - places * total) / spread : 0.0f;
  const float lowest = (total - scale * places) / 32.0f;
  *found = {scale, lowest, -scale * product - lowest * total};
}

void place_four_bits(const float* x, const Line& line, Block& out) {
  out.scale = half_of(line.scale), out.minimum = half_of(line.lowest);
  const float inverse = inverse_of(half_to_float(out.scale));
  whole_numbers(x, 32, inverse, -half_to_float(out.minimum) * inverse, 0.0f, 15.0f, out.q);
}

float lost_by(const float* x, const Block& block) {
  const float scale = half_to_float(block.scale), lowest = half_to_float(block.minimum);
  float sum = 0.0f;
  for (int i = 0; i < 32; ++i) {
    const float off = scale * static_cast<float>(block.q[i]) + lowest - x[i];
    sum += off * off;
  }
  return sum;
}

void four_bits(const float* x, Block& out) {
  const Range found = range(x);
  const float width = found.high - found.low;
  place_four_bits(x, {width / 15.0f, found.low}, out);
  const float lost = lost_by(x, out), same = kSame * half_to_float(out.scale);
  if (!(lost > 32.0f * same * same)) return;
  float total = 0.0f;
  for (int i = 0; i < 32; ++i) total += x[i];
  Line best{}, line{};
  for (int i = 0; i < kFits; ++i) {
    const float inverse = (15.0f + kFirstFit + kNextFit * static_cast<float>(i)) / width;
    nearest_line(x, total, inverse, -found.low * inverse, &line);
    if (i == 0 || line.lost < best.lost) best = line;
  }
  const float inverse = inverse_of(best.scale);
  nearest_line(x, total, inverse, -best.lowest * inverse, &line);
  const Block widest = out;
  place_four_bits(x, line.lost < best.lost ? line : best, out);
  if (!(lost_by(x, out) < lost)) out = widest;
}

template <class Elem>
void read_numbers(const uint8_t* row, int b, float* x) {
  Elem stored[32];
  std::memcpy(stored, row + static_cast<size_t>(b) * sizeof(stored), sizeof(stored));
  for (int i = 0; i < 32; ++i) {
    if constexpr (sizeof(Elem) == 2) x[i] = slip::bf16_to_float(stored[i]);
    else x[i] = stored[i];
  }
}

// Of the scales of blocks that share one, the largest is this number times the shared one, so that others are near enough, and the
// shared one is not so small that few bits of a float16 are left.
constexpr int whole_most(const Layout& l) { return l.bits == 4 ? 63 : 31; }

// The shared one, not less than that, so that nothing is cut off.
uint16_t shared_half(float largest, int most) {
  const float wanted = largest / static_cast<float>(most);
  const uint16_t half = half_of(wanted);
  return half_to_float(half) < wanted && half < 0x7bff ? static_cast<uint16_t>(half + 1) : half;
}
float whole_scale(float scale, float shared, int most) {
  return std::min(std::ceil(scale * inverse_of(shared) - 1e-3f), static_cast<float>(most));
}

template <int Form, class Elem>
void quantised(const uint8_t* row, int b, Block& out) {
  constexpr Layout l = layout(Form);
  float x[32];
  read_numbers<Elem>(row, b, x);
  if constexpr (!l.super && l.minimum == Minimum::kNone) {
    out.scale = half_of(largest(x, 32) / 127.0f);
    whole_numbers(x, 32, inverse_of(half_to_float(out.scale)), 0.0f, -127.0f, 127.0f, out.q);
  } else if constexpr (l.minimum == Minimum::kCentred) {  // the largest becomes -8, whatever its sign
    const Range found = range(x);
    out.scale = half_of((-found.low > found.high ? found.low : found.high) / -8.0f);
    whole_numbers(x, 32, inverse_of(half_to_float(out.scale)), 8.0f, 0.0f, 15.0f, out.q);
  } else if constexpr (l.minimum == Minimum::kZero) {  // which is one of the numbers
    constexpr float kSteps = l.bits == 4 ? 15.0f : 254.0f, kLeast = l.bits == 4 ? 0.0f : -127.0f;
    const Range found = range(x);
    const float low = std::min(found.low, 0.0f), high = std::max(found.high, 0.0f);
    out.scale = half_of((high - low) / kSteps);
    const float inverse = inverse_of(half_to_float(out.scale));
    const float zero = std::clamp(kLeast + std::round(-low * inverse), kLeast, kLeast + kSteps);
    out.minimum = half_of(zero);
    whole_numbers(x, 32, inverse, zero, kLeast, kLeast + kSteps, out.q);
  } else if constexpr (!l.super && l.bits == 4) {
    four_bits(x, out);
  } else if constexpr (!l.super) {
    const Range found = range(x);
    out.scale = half_of((found.high - found.low) / 254.0f);
    const float scale = half_to_float(out.scale);
    out.minimum = half_of(found.low + 127.0f * scale);
    const float inverse = inverse_of(scale);
    whole_numbers(x, 32, inverse, -half_to_float(out.minimum) * inverse, -127.0f, 127.0f, out.q);
  } else {
    // What is shared by 8 blocks follows from the widest of them.
    float scale = 0.0f, minimum = 0.0f, other[32];
    for (int i = b / 8 * 8; i < b / 8 * 8 + 8; ++i) {
      read_numbers<Elem>(row, i, other);
      const Range found = range(other);
      scale = std::max(scale, l.bits == 4 ? (found.high - found.low) / 15.0f : std::max(-found.low, found.high) / 127.0f);
      minimum = std::max(minimum, std::fabs(found.low));
    }
    constexpr int kMost = whole_most(l);
    out.scale = shared_half(scale, kMost);
    scale = half_to_float(out.scale);
    if constexpr (l.bits == 4) {
      const Range found = range(x);
      out.minimum = shared_half(minimum, kMost);
      minimum = half_to_float(out.minimum);
      const float least = std::round(-found.low * inverse_of(minimum));
      out.whole_minimum = static_cast<int8_t>(least);
      out.whole_scale[0] = static_cast<int8_t>(whole_scale((found.high + minimum * least) / 15.0f, scale, kMost));
      const float inverse = inverse_of(scale * static_cast<float>(out.whole_scale[0]));
      whole_numbers(x, 32, inverse, minimum * least * inverse, 0.0f, 15.0f, out.q);
    } else {
      constexpr int kParts = l.sixteen ? 2 : 1, kInputs = 32 / kParts;
      out.minimum = 0, out.whole_minimum = 0;
      for (int part = 0; part < kParts; ++part) {
        const float* first = x + part * kInputs;
        out.whole_scale[part] = static_cast<int8_t>(whole_scale(largest(first, kInputs) / 127.0f, scale, kMost));
        const float inverse = inverse_of(scale * static_cast<float>(out.whole_scale[part]));
        whole_numbers(first, kInputs, inverse, 0.0f, -127.0f, 127.0f, out.q + part * kInputs);
      }
    }
  }
}
