#define SLIP_ISA neonbf16
#define SLIP_BACKEND kNeonBf16
#define SLIP_OWN_BF16
#define SLIP_OWN_WORDS
#include "vec_neonbf16.h"
#include "words_neon.h"

#include "isa.h"
