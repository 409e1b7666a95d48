#pragma once

// Finds which accesses to memory are in order: by what threads do to be in order, not by the turns
// that they happened to take. Every thread has a vector clock, as in FastTrack (Flanagan and Freund
// 2009). Shared memory and the tensors of guarded_memory.cpp are watched.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace specextend::emulation {

// Says until when a thread knows of the others' accesses: of threads', and behind them of those of
// mbarriers, for which copies write.
using Times = std::vector<uint32_t>;

// Adds what `more` knows of to `times`, which may be empty.
void add_times(Times& times, const Times& more);

constexpr int kMaxMbarriers = 128;  // a cluster may have so many

// --- the scheduler tells ---

void begin_grid_accesses(bool early);
// Begins a block, or a cluster; `number` tells it from others of the grid.
void begin_block_accesses(int threads, unsigned number);
// Say that this thread runs, and that another one will.
void begin_turn(int thread);
void end_turn();
// Says that these threads have met: each knows what the others did before.
void order_threads(const std::vector<int>& threads);
// Called at the end of the thread that runs.
void check_has_waited();

// --- the thread that runs ---

void note_read(const void* p, size_t bytes);
void note_write(const void* p, size_t bytes);

// Put what it did until now into `times`; let it know from now on what they hold.
void release_into(Times& times);
void acquire_from(const Times& times);

// Note a copy that it asked for and has not waited for yet: nobody may touch the place, nor may it.
void begin_copy_write(const void* p, size_t bytes);
void end_copy_write(const void* p, size_t bytes);

// Notes a read of tensor cores or of copies: stores to shared memory have to be fenced for it.
void note_engine_read(const void* p, size_t bytes);
// Notes a copy for the mbarrier of this number, in this phase of it.
void note_bulk_copy(const void* to, const void* from, size_t bytes, int mbarrier, uint32_t phase);
// Lets who acquires `times` know of the copies for the mbarrier up to this phase.
void set_phase_over(Times& times, int mbarrier, uint32_t phase);

// Notes a use of an mbarrier, which needs to have been made before.
void check_mbarrier_is_there(const void* p);

}  // namespace specextend::emulation
