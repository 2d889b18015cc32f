#define SLIP_ISA avx2
#define SLIP_BACKEND kAvx2
#define SLIP_OWN_WORDS
#include "vec_avx2.h"
#include "words_avx2.h"

#include "isa.h"
