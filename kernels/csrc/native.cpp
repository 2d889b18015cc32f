// Chooses the instruction set at run time and owns the team of threads.
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "api.h"
#include "backend.h"

#if defined(__x86_64__)
namespace slip {
// Null where the assembler did not know their instructions yet (setup.py).
[[gnu::weak, gnu::visibility("hidden")]] extern const Backend kAvx2Vnni, kAvx512Amx;
[[gnu::weak, gnu::visibility("hidden")]] bool tiles_are_right();
}  // namespace slip
#endif

namespace {

using slip::Backend;

const Backend* g_backend = nullptr;
std::unique_ptr<slip::Team> g_team;

// All that there are, the best one first; null, if they were not compiled.
struct Variant {
  const Backend* backend;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
// Asked for here, since not every compiler's library knows it. Registers are those of AVX2.
bool has_avx2vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

#if defined(SLIP_TRAPPED_TILES)
bool has_tiles() { return true; }  // instructions that the processor does not have are emulated (tests/kernels/replay)
#elif defined(__linux__)
// Tiles are memory of a thread that the system has to save, so a process asks for them first.
bool has_tiles() {
  unsigned a, b, c, d = 0;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr int kRequest = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded && !syscall(SYS_arch_prctl, kRequest, kTileData);
}
#else
bool has_tiles() { return false; }
#endif
bool has_avx512amx() {
  static const bool found = has_avx512bf16() && has_tiles() && slip::tiles_are_right();
  return found;
}

constexpr Variant kVariants[] = {
    {&slip::kAvx512Amx, has_avx512amx},
    {&slip::kAvx512Bf16, has_avx512bf16},
    {&slip::kAvx512Vnni, has_avx512vnni},
    {&slip::kAvx512, has_avx512},
    {&slip::kAvx2Vnni, has_avx2vnni},
    {&slip::kAvx2, has_avx2},
};
#elif defined(__aarch64__)
#if defined(__linux__)
bool has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }  // HWCAP2_BF16
#elif defined(__APPLE__)
bool has_feature(const char* name) {
  int there = 0;
  size_t size = sizeof there;
  return sysctlbyname(name, &there, &size, nullptr, 0) == 0 && there;
}
bool has_dot() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_bf16() { return has_feature("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dot() { return false; }
bool has_bf16() { return false; }
#endif

constexpr Variant kVariants[] = {
    {&slip::kNeonBf16, [] { return has_dot() && has_bf16(); }},
    {&slip::kNeonDot, has_dot},
    {&slip::kNeon, [] { return true; }},  // which every such processor has
};
#else
#error "there are no kernels for this architecture"
#endif

}  // namespace

namespace slip {
Team& team() { return *g_team; }
}  // namespace slip

extern "C" {

int64_t slip_layout(void) {
  int64_t found = 4;  // another number, here and in library.py, whenever functions come or change
  for (int64_t size : {sizeof(SlipPart), sizeof(SlipLinear), sizeof(SlipAdapter), sizeof(SlipLayer), sizeof(SlipModel),
                       sizeof(SlipBatch), sizeof(SlipAttention), sizeof(SlipChains)})
    found = found * 131 + size;
  return found;
}

const char* slip_init(int32_t threads) {
  for (const auto& [backend, runs_here] : kVariants) {
    if (!backend || !runs_here()) continue;
    g_backend = backend;
    slip_set_threads(threads);
    return backend->name;
  }
  return nullptr;
}

const char* slip_isa(void) { return g_backend->name; }

const char* slip_variant(int32_t index, int32_t* runs_here) {
  for (const auto& [backend, runs] : kVariants) {
    if (!backend || index-- > 0) continue;
    *runs_here = runs();
    return backend->name;
  }
  return nullptr;
}

int32_t slip_select(const char* isa) {
  for (const auto& [backend, runs_here] : kVariants) {
    if (backend && std::strcmp(backend->name, isa) == 0 && runs_here()) {
      g_backend = backend;
      return 0;
    }
  }
  return 1;
}

void slip_set_threads(int32_t threads) {
  if (!g_team || g_team->size() != threads) g_team = std::make_unique<slip::Team>(threads);
}

void slip_linear(int32_t dtype, const SlipLinear* w, const float* x, int32_t rows, float* out, int32_t ld) {
  g_backend->linear(*g_team, dtype, *w, x, rows, out, ld);
}

void slip_store_kv(const SlipAttention* a, const SlipBatch* b, const float* k, const float* v, void* k_cache, void* v_cache) {
  g_backend->store_kv(*g_team, *a, *b, k, v, k_cache, v_cache);
}

void slip_attention(const SlipAttention* a, const SlipBatch* b, const float* q, const void* k_cache, const void* v_cache,
                    float* out) {
  g_backend->attention(*g_team, *a, *b, q, k_cache, v_cache, out);
}

int64_t slip_workspace_bytes(const SlipModel* m, int32_t tokens) { return g_backend->workspace_bytes(*m, tokens); }

void slip_forward(const SlipModel* m, const SlipBatch* b, float* hidden, void* workspace) {
  g_backend->forward(*g_team, *m, *b, hidden, workspace);
}

void slip_logits(const SlipModel* m, const float* hidden, const int32_t* rows, int32_t num_rows, float* logits, int32_t vocab,
                 void* workspace) {
  g_backend->logits(*g_team, *m, hidden, rows, num_rows, logits, vocab, workspace);
}

void slip_argmax(const float* logits, int32_t rows, int32_t n, int32_t* out, float* likely) {
  g_backend->argmax(*g_team, logits, rows, n, out, likely);
}

void slip_log_probabilities(const float* logits, int32_t rows, int32_t n, const int32_t* tokens, int32_t count, float* own,
                            int32_t* ranks, int32_t* top_tokens, float* top) {
  g_backend->log_probabilities(*g_team, logits, rows, n, tokens, count, own, ranks, top_tokens, top);
}

void slip_distribution(float* logits, int32_t rows, int32_t n, const float* temperature, const int32_t* top_k, const float* min_p,
                       const float* top_p) {
  g_backend->distribution(*g_team, logits, rows, n, temperature, top_k, min_p, top_p);
}

void slip_race(const float* weights, int32_t rows, int32_t n, const uint64_t* seeds, const uint64_t* indices, const int32_t* ids,
               int32_t count, int32_t* places, float* scores) {
  g_backend->race(*g_team, weights, rows, n, seeds, indices, ids, count, places, scores);
}

void slip_read(const float* memory, int64_t count) { g_backend->read_once(*g_team, memory, count); }

double slip_multiply(int32_t dtype, int64_t times) { return g_backend->multiply(*g_team, dtype, times); }
}
