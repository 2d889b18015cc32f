#define SLIP_ISA avx2
#define SLIP_BACKEND kAvx2
#include "vec_avx2.h"

#include "isa.h"
