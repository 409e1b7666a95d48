#pragma once

// Stands in for the compiler's AMX intrinsics, for a processor without tiles: as Intel's Software
// Developer's Manual defines them. Every thread has its own eight tiles, and an intrinsic that the
// processor would refuse, or that is not what a kernel should do, throws.

#include <immintrin.h>
#include <stdint.h>

namespace specextend::emulation::amx {

// Throws for what the manual calls a general protection fault, and for tiles that are configured
// already: whoever did so did not release them.
void load_config(const void* config);
// Throws for tiles that are not configured.
void release();
void zero(int tile);
void load(int tile, const void* base, long stride);
void store(int tile, void* base, long stride);
// Throws for tiles that do not fit together, or of which two are the same.
void multiply_bf16(int c, int a, int b);

}  // namespace specextend::emulation::amx

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig specextend::emulation::amx::load_config
#define _tile_release specextend::emulation::amx::release
#define _tile_loadd specextend::emulation::amx::load
#define _tile_stream_loadd specextend::emulation::amx::load
#define _tile_stored specextend::emulation::amx::store
#define _tile_zero specextend::emulation::amx::zero
#define _tile_dpbf16ps specextend::emulation::amx::multiply_bf16
