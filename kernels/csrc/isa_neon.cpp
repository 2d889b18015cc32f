#define SLIP_ISA neon
#define SLIP_BACKEND kNeon
#define SLIP_OWN_WORDS
#include "vec_neon.h"
#include "words_neon.h"

#include "isa.h"
