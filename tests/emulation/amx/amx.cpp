#include "tiles.h"
#define __AVX512BF16__ 1
#define __AMX_BF16__ 1
#define SPECEXTEND_ISA amx
#include "cpu/isa/table.h"
