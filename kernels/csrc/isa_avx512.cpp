// AVX-512 without instructions for bfloat16: Skylake to Ice Lake servers, and virtual machines that hide them.
#define SLIP_ISA avx512
#define SLIP_BACKEND kAvx512
#define SLIP_OWN_WORDS
#include "vec_avx512.h"
#include "words_avx512.h"

namespace slip::avx512 {

// The register tile of the micro-kernel: up to kMaxRows rows times tile_panels(rows) panels, whose sums take 24 of the 32
// registers. Widening a panel takes two instructions on the ports that multiply, so tall tiles waste less.
constexpr int kMaxRows = 12;
constexpr int tile_panels(int rows) { return rows > 6 ? 2 : 4; }

}  // namespace slip::avx512

#include "isa.h"
