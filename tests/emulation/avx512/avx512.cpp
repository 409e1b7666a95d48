#include <immintrin.h>
#define SPECEXTEND_ISA avx512
#include "cpu/isa/table.h"
