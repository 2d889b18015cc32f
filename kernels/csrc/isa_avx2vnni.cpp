// With dot products of bytes: Alder Lake and later processors without AVX-512.
#define SLIP_ISA avx2vnni
#define SLIP_BACKEND kAvx2Vnni
#define SLIP_OWN_WORDS
#include "vec_avx2.h"
#include "words_avx2.h"

#include "isa.h"
