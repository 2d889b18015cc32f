#define SLIP_ISA avx512bf16
#define SLIP_BACKEND kAvx512Bf16
#include "vec_avx512bf16.h"

#include "isa.h"
