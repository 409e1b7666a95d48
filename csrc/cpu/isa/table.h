// Compiled once per instruction set (cmake/cpu_isa.cmake), each time in a namespace of its own, so
// that no inline function built with one set's flags can serve another.

#include "cpu/isa.h"
#include "cpu/isa/chunk_mass.h"
#include "cpu/isa/invariant_linear.h"
#include "cpu/isa/rms_norm.h"
#include "cpu/isa/rotary_append.h"
#include "cpu/isa/rotate.h"
#include "cpu/isa/silu_mul.h"
#include "cpu/isa/tree_attention.h"
#include "cpu/isa/vocab.h"

#define SPECEXTEND_CONCAT_(a, b) a##b
#define SPECEXTEND_CONCAT(a, b) SPECEXTEND_CONCAT_(a, b)
#define SPECEXTEND_STRING_(a) #a
#define SPECEXTEND_STRING(a) SPECEXTEND_STRING_(a)

namespace specextend::cpu {

extern const Isa SPECEXTEND_CONCAT(isa_, SPECEXTEND_ISA);
const Isa SPECEXTEND_CONCAT(isa_, SPECEXTEND_ISA) = {
    SPECEXTEND_STRING(SPECEXTEND_ISA),
    {vocab::kernels<float>(), vocab::kernels<vocab::Half>(), vocab::kernels<vocab::BFloat16>()},
    {attention::kernels<float>(), attention::kernels<simd::Half>(),
     attention::kernels<simd::BFloat16>()},
    {vocab::chunk_mass<false>, vocab::chunk_mass<true>},
    {rotary::kernels<float>(), rotary::kernels<simd::Half>(), rotary::kernels<simd::BFloat16>()},
    {linear::kernels<float>(), linear::kernels<simd::Half>(), linear::kernels<simd::BFloat16>()},
    {rows::rms_norm<float>, rows::rms_norm<simd::Half>, rows::rms_norm<simd::BFloat16>},
    {rotary::rotate_row<float>, rotary::rotate_row<simd::Half>, rotary::rotate_row<simd::BFloat16>},
    {rows::silu_mul<simd::Half>, rows::silu_mul<simd::BFloat16>},
};

}  // namespace specextend::cpu
