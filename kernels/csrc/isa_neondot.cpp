// With dot products of bytes: Neoverse N1, Graviton 2, Ampere Altra, Apple M1 and later.
#define SLIP_ISA neondot
#define SLIP_BACKEND kNeonDot
#define SLIP_OWN_WORDS
#include "vec_neon.h"
#include "words_neon.h"

#include "isa.h"
