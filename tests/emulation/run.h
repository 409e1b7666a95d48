#pragma once

// Declares what the parts of the runtime ask of each other about the block that runs.

#include <cstddef>
#include <string>

#include "emulation/block.h"

namespace specextend::emulation {

// All shared memory that there may be is the blocks' of a cluster; a place has an offset in it.
constexpr size_t kAllSharedBytes = kMaxCluster * ((kMaxSharedBytes + 1023) / 1024 * 1024);
extern const unsigned char* all_shared;
inline size_t offset_in_shared(const void* p) {
  return size_t(static_cast<const unsigned char*>(p) - all_shared);
}
// Gives the offset of a place in the shared memory of its block.
size_t offset_in_block(const void* p);

// Say for errors "thread (3, 0, 0)", and where the thread that runs has met others last.
std::string name_of_thread(int thread);
std::string last_place();

// Says that the block got somewhere: who polls may go on doing so.
void note_progress();

// --- copies.cpp ---

// Called before a block of so many threads.
void forget_copies(int threads);
// Called after the thread's last instruction.
void end_copies_of_thread();
// Lands copies of the thread that runs before they must land, if the schedule wants it.
void maybe_land_early();

// --- hopper.cpp ---

// Called before a block: forgets those of a launch that failed.
void forget_products(int threads);

}  // namespace specextend::emulation
