#define SLIP_ISA avx2
#include "vec_avx2.h"
#include "isa.h"

namespace slip {
const Backend kAvx2{avx2::kName,           avx2::run_linear,  avx2::run_store_kv, avx2::run_attention,
                    avx2::run_workspace_bytes, avx2::run_forward, avx2::run_logits};
}
