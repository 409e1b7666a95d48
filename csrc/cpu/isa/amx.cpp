#include "cpu/isa/table.h"
