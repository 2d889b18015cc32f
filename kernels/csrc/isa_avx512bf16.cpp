#define SLIP_ISA avx512bf16
#include "vec_avx512bf16.h"
#include "isa.h"

namespace slip {
const Backend kAvx512Bf16{avx512bf16::kName,           avx512bf16::run_linear,  avx512bf16::run_store_kv, avx512bf16::run_attention,
                          avx512bf16::run_workspace_bytes, avx512bf16::run_forward, avx512bf16::run_logits};
}
