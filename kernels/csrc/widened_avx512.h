// AVX-512 without instructions for bfloat16, which is widened in registers.
#pragma once
#include "vec_avx512.h"

namespace slip::SLIP_ISA {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels, whose sums take 24 of the 32
// registers. Widening a panel takes two instructions on the ports that multiply, so tall tiles waste less.
constexpr int kMaxRows = 12;
constexpr int tile_panels(int rows) { return rows > 6 ? 2 : 4; }

}  // namespace slip::SLIP_ISA
