// Memory of a GPU apart from the addresses that it is seen at, for tensors whose rows several
// caches share: the same memory is mapped into several ranges of addresses.
#pragma once

#include <cstdint>
#include <optional>

namespace specextend {

// Sizes and addresses here are multiples of this, in bytes. 0: the device, or its driver, cannot
// map memory.
int64_t memory_granularity(int32_t device);

// Takes physical memory, which has no addresses and holds anything. Nothing: there is not enough.
// The functions throw where the driver refuses for another reason.
std::optional<uint64_t> create_memory(int32_t device, int64_t bytes);

// Gives up memory: it is free once it is mapped nowhere.
void release_memory(uint64_t memory);

// Reserves a range of addresses with nothing behind it.
uint64_t reserve_addresses(int64_t bytes);

// Gives up a range, as a whole. Nothing is mapped into it any more.
void free_addresses(uint64_t begin, int64_t bytes);

// Maps all of a memory, of so many bytes, to where nothing is mapped yet, for its device to read
// and write.
void map_memory(int32_t device, uint64_t begin, int64_t bytes, uint64_t memory);

// Takes away what one call of map_memory has mapped. Waits for all that the device has to do, which
// may use these addresses; so it must not be called while the device's work is captured.
void unmap_memory(int32_t device, uint64_t begin, int64_t bytes);

// Returns whether torch's current stream of the device is being captured.
bool is_captured(int32_t device);

}  // namespace specextend
