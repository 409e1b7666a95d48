// Makes copies that go on while threads do other things. They take effect as late as a wait allows,
// or, with random schedules, some of them at other times before; their source is read when they are
// asked for or when they take effect, and their destination is poisoned in between.

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "emulation/block.h"
#include "races.h"
#include "run.h"

namespace specextend::emulation {
namespace {

constexpr int kPatience = 64;  // after so many polls of an mbarrier a copy must land

struct AsyncCopy {
  unsigned char* to;
  const unsigned char* from;
  bool valid, read, landed;  // once `read`, the bytes are here
  int group;
  unsigned char bytes[16];
};

struct BulkCopy {
  unsigned char* to;
  const unsigned char* from;
  size_t size;
  std::vector<unsigned char> bytes;  // they are empty while they are not read
  uint64_t* barrier;                 // copies to shared memory have one
  int group;                         // copies to global memory have one
};

struct ThreadCopies {
  std::vector<AsyncCopy> async;
  int async_group = 0;
  std::vector<BulkCopy> stores;
  int store_group = 0;
};

ThreadCopies all_copies[kMaxThreads];
std::vector<BulkCopy> loads;  // all threads share them

ThreadCopies& mine() { return all_copies[thread()]; }

void land(AsyncCopy& c) {
  c.landed = true;
  if (!c.valid) {
    memset(c.to, 0, 16);
  } else {
    memcpy(c.to, c.read ? c.bytes : c.from, 16);
  }
}

void read(BulkCopy& c) {
  if (c.bytes.empty()) c.bytes.assign(c.from, c.from + c.size);
}

void write(BulkCopy& c) {
  read(c);
  memcpy(c.to, c.bytes.data(), c.size);
}

// --- mbarrier, in the 64 bits that the kernel has for it ---

struct Mbarrier {
  uint16_t count, pending;  // arrivals
  int32_t bytes_and_phase;  // twice the bytes under way, plus the phase's parity

  int phase() const { return bytes_and_phase & 1; }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

// Holds what is known of it besides.
struct MbarrierNotes {
  int number;      // it tells those of the cluster apart
  uint32_t phase;  // it counts from 1
  int maker;       // this thread has initialised it,
  bool fenced;     // and it is there for that one alone before the fence
  Times arriving;  // this is what those have done who have arrived in this phase,
  Times arrived;   // and this in the ones before
};
std::map<const uint64_t*, MbarrierNotes> all_notes;

MbarrierNotes& notes_of(const uint64_t* p) { return all_notes.at(p); }

Mbarrier load(const uint64_t* p) {
  check_shared("mbarrier", p, sizeof(*p));
  Mbarrier b;
  memcpy(&b, p, sizeof(b));
  if (b.count == 0 || b.count == 0xffff || all_notes.count(p) == 0) {
    fail("an mbarrier that is not initialised");
  }
  const MbarrierNotes& notes = notes_of(p);
  if (!notes.fenced && notes.maker != thread()) {
    fail("an mbarrier of which " + name_of_thread(notes.maker) +
         " has not fenced the initialisation");
  }
  check_mbarrier_is_there(p);
  return b;
}

// Stores it, and ends the phase where it is over.
void store(uint64_t* p, Mbarrier b) {
  if (b.pending == 0 && b.bytes_and_phase >> 1 == 0) {
    b.pending = b.count;
    b.bytes_and_phase ^= 1;
    MbarrierNotes& notes = notes_of(p);
    add_times(notes.arrived, notes.arriving);
    set_phase_over(notes.arrived, notes.number, notes.phase++);
    notes.arriving.clear();
    note_progress();
  }
  memcpy(p, &b, sizeof(b));
}

void land_some_load() {
  if (loads.empty()) return;
  const size_t i = draw(unsigned(loads.size()));
  BulkCopy c = std::move(loads[i]);
  loads.erase(loads.begin() + long(i));
  write(c);
  Mbarrier b;
  memcpy(&b, c.barrier, sizeof(b));
  b.bytes_and_phase -= 2 * int32_t(c.size);
  store(c.barrier, b);
  note_progress();
}

void check_bulk(const void* shared, const void* global, uint32_t bytes) {
  if (bytes == 0 || bytes % 16 != 0) {
    fail("a bulk copy of " + std::to_string(bytes) + " bytes, which must be a multiple of 16");
  }
  check_shared("a bulk copy", shared, 16);
  check_shared("the end of a bulk copy", static_cast<const char*>(shared) + bytes - 16, 16);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("a bulk copy with a global address that is not a multiple of 16");
  }
}

}  // namespace

void forget_copies(int threads) {
  for (int i = 0; i < threads; ++i) {
    ThreadCopies& t = all_copies[i];
    t.async.clear();
    t.stores.clear();
    t.async_group = t.store_group = 0;
  }
  loads.clear();
  all_notes.clear();
}

void end_copies_of_thread() {
  for (BulkCopy& c : mine().stores) {
    if (c.bytes.empty()) fail("ends before its bulk copies have read shared memory");
    write(c);
  }
  mine().stores.clear();
  for (const BulkCopy& c : loads) {
    if (c.group == thread()) fail("ends before its bulk copies to shared memory have landed");
  }
}

void maybe_land_early() {
  std::vector<AsyncCopy>& copies = mine().async;
  if (settings.kind != Kind::kRandom || copies.empty() || draw(8) != 0) return;
  AsyncCopy& c = copies[draw(unsigned(copies.size()))];
  if (!c.landed) land(c);
}

void cp_async_16(void* shared, const void* global, bool valid) {
  check_shared("cp.async", shared, 16);
  AsyncCopy c{};
  c.to = static_cast<unsigned char*>(shared);
  c.from = static_cast<const unsigned char*>(global);
  c.valid = valid;
  c.group = mine().async_group;
  if (valid) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
      fail("cp.async from an address that is not a multiple of 16");
    }
    note_read(global, 16);
    memcpy(c.bytes, global, 16);  // an access out of bounds shows here
    c.read = draw(2) == 0;
  }
  begin_copy_write(shared, 16);
  memset(shared, kPoison, 16);
  mine().async.push_back(c);
  maybe_land_early();
}

void cp_async_commit() {
  ++mine().async_group;
  maybe_land_early();
}

void cp_async_wait(int pending) {
  ThreadCopies& t = mine();
  const auto covered = [&](const AsyncCopy& c) { return c.group < t.async_group - pending; };
  for (AsyncCopy& c : t.async) {
    if (!covered(c)) continue;
    if (!c.landed) land(c);
    end_copy_write(c.to, 16);
  }
  t.async.erase(std::remove_if(t.async.begin(), t.async.end(), covered), t.async.end());
}

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  check_shared("mbarrier", barrier, sizeof(*barrier));
  if (count == 0 || count >= 0xffff) fail("an mbarrier of " + std::to_string(count) + " arrivals");
  note_write(barrier, sizeof(*barrier));
  const Mbarrier b{uint16_t(count), uint16_t(count), 0};
  memcpy(barrier, &b, sizeof(b));
  const int number = int(all_notes.size());
  if (number == kMaxMbarriers) fail("more mbarriers than are looked after");
  MbarrierNotes& notes = all_notes.try_emplace(barrier, MbarrierNotes{number, 1}).first->second;
  notes.maker = thread();
  notes.fenced = false;
}

void fence_mbarrier_init() {
  for (auto& [barrier, notes] : all_notes) notes.fenced |= notes.maker == thread();
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  Mbarrier b = load(barrier);
  if (b.pending == 0) fail("more arrivals at an mbarrier than it has a count of");
  --b.pending;
  b.bytes_and_phase += 2 * int32_t(bytes);
  release_into(notes_of(barrier).arriving);
  store(barrier, b);
}

bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
  const auto is_over = [&] {
    const bool over = load(barrier).phase() != int(parity);
    if (over) acquire_from(notes_of(barrier).arrived);
    return over;
  };
  if (is_over()) return true;
  const int polls = yield();
  if (settings.kind == Kind::kRandom ? draw(4) == 0 : polls > kPatience) land_some_load();
  return is_over();
}

void bulk_copy_to_shared(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_bulk(shared, global, bytes);
  load(barrier);
  const MbarrierNotes& notes = notes_of(barrier);
  if (!notes.fenced) fail("a bulk copy for an mbarrier whose initialisation is not fenced");
  note_bulk_copy(shared, global, bytes, notes.number, notes.phase);
  BulkCopy c{static_cast<unsigned char*>(shared),
             static_cast<const unsigned char*>(global),
             bytes,
             {},
             barrier,
             thread()};
  read(c);  // an access out of bounds shows here
  if (draw(2) == 0) c.bytes.clear();
  memset(shared, kPoison, bytes);
  loads.push_back(std::move(c));
}

void bulk_copy_to_global(void* global, const void* shared, uint32_t bytes) {
  check_bulk(shared, global, bytes);
  note_engine_read(shared, bytes);
  note_write(global, bytes);
  mine().stores.push_back({static_cast<unsigned char*>(global),
                           static_cast<const unsigned char*>(shared),
                           bytes,
                           {},
                           nullptr,
                           mine().store_group});
}

void bulk_commit_group() { ++mine().store_group; }

void bulk_wait_group(int pending, bool only_read) {
  ThreadCopies& t = mine();
  const auto covered = [&](const BulkCopy& c) { return c.group < t.store_group - pending; };
  for (BulkCopy& c : t.stores) {
    if (!covered(c)) continue;
    read(c);
    if (!only_read) write(c);
  }
  if (!only_read) {
    t.stores.erase(std::remove_if(t.stores.begin(), t.stores.end(), covered), t.stores.end());
  }
}

}  // namespace specextend::emulation
