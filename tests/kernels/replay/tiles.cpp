// Runs AMX's instructions on x86-64 processors that have none: each traps, is decoded, and done here as the manual says (Intel 64 and
// IA-32 Architectures Software Developer's Manual, volume 2, "LDTILECFG" … "TDPBSSD"). So what is proved is the very code that was
// compiled, but for how long it takes. Linked into the replaying program.
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tiles {
  bool configured = false;
  uint16_t bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
thread_local Tiles t;

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

[[noreturn]] void wrong(const uint8_t* at, const char* why) {
  std::fprintf(stderr, "illegal instruction, which is none of AMX or may not be done: %s:", why);
  for (int i = 0; i < 10; ++i) std::fprintf(stderr, " %02x", at[i]);
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

// Numbers that are not normal count as zeros, and become zeros.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float widened(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}

void configure(const uint8_t* at, const uint8_t* code) {
  if (at[0] != 1 || at[1] != 0) wrong(code, "LDTILECFG with another palette than 1");
  t.configured = true;
  for (int i = 0; i < 8; ++i) {
    std::memcpy(&t.bytes[i], at + 16 + 2 * i, 2);
    t.rows[i] = at[48 + i];
    if (t.bytes[i] > 64 || t.rows[i] > 16 || !t.bytes[i] != !t.rows[i]) wrong(code, "LDTILECFG with a shape that no tile has");
  }
  std::memset(t.data, 0, sizeof t.data);
}

// Adds four bytes of a row times four of a column, k times: TDPBF16PS.
void add_pairs(const uint8_t* x, const uint8_t (*w)[64], int n, int count, uint8_t* out) {
  float even = 0.0f, odd = 0.0f, sum;
  for (int k = 0; k < count; ++k, x += 4) {
    even = flushed(std::fma(widened(x), widened(w[k] + 4 * n), even));
    odd = flushed(std::fma(widened(x + 2), widened(w[k] + 4 * n + 2), odd));
  }
  std::memcpy(&sum, out, 4);
  sum = flushed(flushed(sum) + flushed(even + odd));
  std::memcpy(out, &sum, 4);
}
// The same: TDPBSSD.
void add_quads(const uint8_t* x, const uint8_t (*w)[64], int n, int count, uint8_t* out) {
  uint32_t sum;
  std::memcpy(&sum, out, 4);
  for (int k = 0; k < count; ++k)
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(x[4 * k + i]) * static_cast<int8_t>(w[k][4 * n + i]);
  std::memcpy(out, &sum, 4);
}

template <class Add>
void multiply(int sums, int left, int right, const uint8_t* code, const Add& add) {
  if (t.bytes[left] / 4 != t.rows[right] || t.rows[sums] != t.rows[left] || t.bytes[sums] != t.bytes[right])
    wrong(code, "a product of tiles that do not fit");
  for (int m = 0; m < t.rows[sums]; ++m)
    for (int n = 0; n < t.bytes[sums] / 4; ++n) add(t.data[left][m], t.data[right], n, t.rows[right], t.data[sums][m] + 4 * n);
}

void trapped(int, siginfo_t*, void* context) {
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  // VEX with three bytes: C4, then inverted R X B and the map, then W, inverted vvvv, L and the prefix.
  if (code[0] != 0xc4 || (code[1] & 31) != 2 || code[2] & 0x84) wrong(code, "no VEX.128.0F38.W0");
  const int r = ~code[1] >> 4 & 8, x = ~code[1] >> 3 & 8, b = ~code[1] >> 2 & 8, vvvv = ~code[2] >> 3 & 15, prefix = code[2] & 3;
  const int opcode = code[3], modrm = code[4], mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  enum { kNone, k66, kF3, kF2 };
  int length = 5;
  uint8_t* memory = nullptr;
  int64_t stride = 0;
  if (mod != 3) {
    int base = rm | b;
    if (rm == 4) {
      const int sib = code[length++];
      base = (sib & 7) | b;
      const int index = (sib >> 3 & 7) | x;
      if (index != 4) stride = registers[kRegisters[index]] * (int64_t{1} << (sib >> 6));
      if (mod == 0 && (sib & 7) == 5) wrong(code, "an address without a base");
    } else if (mod == 0 && rm == 5) {
      base = -1;  // relative to the next instruction
    }
    int32_t offset = 0;
    if (mod == 1) offset = static_cast<int8_t>(code[length++]);
    if (mod == 2 || base < 0) std::memcpy(&offset, code + length, 4), length += 4;
    memory = reinterpret_cast<uint8_t*>((base < 0 ? registers[REG_RIP] + length : registers[kRegisters[base]]) + offset);
  }
  if (r && opcode != 0x49) wrong(code, "a tile beyond the seventh");
  const bool configures = opcode == 0x49 && prefix == kNone && memory;
  if (!t.configured && !configures && !(opcode == 0x49 && prefix == kNone)) wrong(code, "tiles without shapes");
  if (configures) {
    configure(memory, code);
  } else if (opcode == 0x49 && prefix == kNone && modrm == 0xc0) {
    t.configured = false;
  } else if (opcode == 0x49 && prefix == kF2 && mod == 3) {
    std::memset(t.data[reg], 0, sizeof t.data[reg]);
  } else if (opcode == 0x4b && (prefix == kF2 || prefix == kF3) && memory) {
    if (!t.rows[reg]) wrong(code, "a tile that has no rows");
    if (prefix == kF2) std::memset(t.data[reg], 0, sizeof t.data[reg]);
    for (int row = 0; row < t.rows[reg]; ++row) {
      uint8_t *there = memory + row * stride, *here = t.data[reg][row];
      std::memcpy(prefix == kF2 ? here : there, prefix == kF2 ? there : here, t.bytes[reg]);
    }
  } else if (opcode == 0x5c && prefix == kF3 && mod == 3) {
    multiply(reg, rm, vvvv, code, add_pairs);
  } else if (opcode == 0x5e && prefix == kF2 && mod == 3) {
    multiply(reg, rm, vvvv, code, add_quads);
  } else {
    wrong(code, "an instruction that is not known here");
  }
  registers[REG_RIP] += length;
}

[[gnu::constructor]] void install() {
  struct sigaction action {};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace
