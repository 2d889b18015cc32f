// With dot products of bytes: Cascade Lake and Ice Lake servers, Tiger Lake.
#define SLIP_ISA avx512vnni
#define SLIP_BACKEND kAvx512Vnni
#define SLIP_OWN_WORDS
#include "widened_avx512.h"
#include "words_avx512.h"

#include "isa.h"
