// Instantiates the kernels for the instruction set whose vec_*.h was included before, in namespace SLIP_ISA.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "backend.h"

#define SLIP_TEXT_OF(name) #name
#define SLIP_TEXT(name) SLIP_TEXT_OF(name)

namespace slip::SLIP_ISA {

#include "dense.h"
#include "gemm.h"
#include "forms.h"
#ifndef SLIP_OWN_WORDS
#include "words_portable.h"
#endif
#ifndef SLIP_TILES
struct WholeTiles {  // there are none
  static constexpr int kRows = 0;
};
#endif
#include "packed.h"
#include "rounded.h"
#include "cache.h"
#include "attention.h"
#include "project.h"
#include "decoder.h"
#include "sampling.h"
#include "race.h"
#include "measure.h"

#define SLIP_BY_DTYPE(dtype, call) ((dtype) == SLIP_BF16 ? call<Bf16> : call<F32>)

static void run_linear(Team& team, int32_t dtype, const SlipLinear& w, const float* x, int32_t rows, float* out, int32_t ld) {
  SLIP_BY_DTYPE(dtype, linear)(team, w, x, rows, out, ld);
}
static void run_store_kv(Team& team, const SlipAttention& a, const SlipBatch& b, const float* k, const float* v, void* kc, void* vc) {
  SLIP_BY_DTYPE(a.dtype, store_kv)(team, a, b, k, v, kc, vc);
}
static void run_attention(Team& team, const SlipAttention& a, const SlipBatch& b, const float* q, const void* kc, const void* vc,
                          float* out) {
  SLIP_BY_DTYPE(a.dtype, attention)(team, a, b, q, kc, vc, out);
}
static int64_t run_workspace_bytes(const SlipModel& m, int32_t tokens) {
  return SLIP_BY_DTYPE(m.dtype, workspace_bytes)(m, tokens);
}
static void run_forward(Team& team, const SlipModel& m, const SlipBatch& b, float* hidden, void* memory) {
  SLIP_BY_DTYPE(m.dtype, forward)(team, m, b, hidden, memory);
}
static void run_logits(Team& team, const SlipModel& m, const float* hidden, const int32_t* rows, int32_t num_rows, float* out,
                       int32_t vocab, void* memory) {
  SLIP_BY_DTYPE(m.dtype, logits)(team, m, hidden, rows, num_rows, out, vocab, memory);
}
static double run_multiply(Team& team, int32_t dtype, int64_t times) {
  if (dtype == SLIP_BYTES) return multiply_bytes(team, times);
  return SLIP_BY_DTYPE(dtype, multiply_in_registers)(team, times);
}

}  // namespace slip::SLIP_ISA

namespace slip {

extern const Backend SLIP_BACKEND;
const Backend SLIP_BACKEND{
    .name = SLIP_TEXT(SLIP_ISA),
    .linear = SLIP_ISA::run_linear,
    .store_kv = SLIP_ISA::run_store_kv,
    .attention = SLIP_ISA::run_attention,
    .workspace_bytes = SLIP_ISA::run_workspace_bytes,
    .forward = SLIP_ISA::run_forward,
    .logits = SLIP_ISA::run_logits,
    .argmax = SLIP_ISA::argmax,
    .log_probabilities = SLIP_ISA::log_probabilities,
    .distribution = SLIP_ISA::distribution,
    .race = SLIP_ISA::race,
    .read_once = SLIP_ISA::read_once,
    .multiply = SLIP_ISA::run_multiply,
};

}  // namespace slip
