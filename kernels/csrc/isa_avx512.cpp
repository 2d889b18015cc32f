// Skylake servers, and virtual machines that hide what came later.
#define SLIP_ISA avx512
#define SLIP_BACKEND kAvx512
#define SLIP_OWN_WORDS
#include "widened_avx512.h"
#include "words_avx512.h"

#include "isa.h"
