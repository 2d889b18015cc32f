#define SLIP_ISA neon
#define SLIP_BACKEND kNeon
#include "vec_neon.h"

#include "isa.h"
