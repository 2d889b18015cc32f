// What one instruction set offers; the table that api.h's functions go through.
#pragma once
#include "api.h"
#include "team.h"

namespace slip {

struct Backend {
  const char* name;
  void (*linear)(Team&, int32_t, const SlipLinear&, const float*, int32_t, float*, int32_t);
  void (*store_kv)(Team&, const SlipAttention&, const SlipBatch&, const float*, const float*, void*, void*);
  void (*attention)(Team&, const SlipAttention&, const SlipBatch&, const float*, const void*, const void*, float*);
  int64_t (*workspace_bytes)(const SlipModel&, int32_t);
  void (*forward)(Team&, const SlipModel&, const SlipBatch&, float*, void*);
  void (*logits)(Team&, const SlipModel&, const float*, const int32_t*, int32_t, float*, int32_t, void*);
  void (*argmax)(Team&, const float*, int, int, int32_t*, float*);
  void (*log_probabilities)(Team&, const float*, int, int, const int32_t*, int, float*, int32_t*, int32_t*, float*);
  void (*distribution)(Team&, float*, int, int, const float*, const int32_t*, const float*, const float*);
  void (*race)(Team&, const float*, int, int, const uint64_t*, const uint64_t*, const int32_t*, int, int32_t*, float*);
  void (*read_once)(Team&, const float*, int64_t);
  double (*multiply)(Team&, int32_t, int64_t);
};

// The threads that compute.
Team& team();

// The weights of one column of a panel of a quantised part (forms.h); `group` is where the panel's group begins, of `form`. The same
// floats whatever the instruction set.
void unpack_column(int form, const uint8_t* group, int panel, int column, int k, float* out);

#if defined(__x86_64__)
extern const Backend kAvx512Amx;
extern const Backend kAvx512Bf16;
extern const Backend kAvx512Vnni;
extern const Backend kAvx512;
extern const Backend kAvx2Vnni;
extern const Backend kAvx2;
bool tiles_are_right();  // only where the processor has tiles, and the system lets them be used
#elif defined(__aarch64__)
extern const Backend kNeonBf16;
extern const Backend kNeonDot;
extern const Backend kNeon;
#endif

}  // namespace slip
