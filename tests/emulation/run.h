#pragma once

// What the parts of the runtime ask of each other about the block that runs.

namespace specextend::emulation {

// The block got somewhere: who polls may go on doing so.
void note_progress();

// --- copies.cpp ---

// Before a block of so many threads.
void forget_copies(int threads);
// After the thread's last instruction.
void end_copies_of_thread();
// Copies of the thread that runs land before they must, if the schedule wants it.
void maybe_land_early();

}  // namespace specextend::emulation
