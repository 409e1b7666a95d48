#include <immintrin.h>
#define __AVX512BF16__ 1
#define SPECEXTEND_ISA avx512_bf16
#include "cpu/isa/table.h"
