#define SLIP_ISA avx512bf16
#define SLIP_BACKEND kAvx512Bf16
#define SLIP_OWN_BF16
#define SLIP_OWN_WORDS
#include "vec_avx512bf16.h"
#include "words_avx512.h"

#include "isa.h"
