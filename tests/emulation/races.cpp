#include "races.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>

#include "emulation/block.h"
#include "host.h"
#include "run.h"

namespace specextend::emulation {
namespace {

constexpr size_t kLine = 16;                    // bytes; each has a bit of a mask
constexpr uint32_t kUnpublished = 0xffffffffu;  // a cp.async has it until it is waited for

// Says who has accessed which bytes of a line last, and when: a thread in its own time, or, behind
// the threads in number, a copy for an mbarrier in one of its phases.
struct Access {
  uint32_t time;
  uint16_t who;
  uint16_t bytes;
};

// Says which bytes of a line a block has accessed.
struct BlockAccesses {
  unsigned block;
  uint16_t written, updated, read;
};

// Holds what is to be known of some bytes; nothing of accesses that all later ones follow in order.
struct Line {
  uint64_t begin = 0;
  uint64_t block = 0, era = 0;  // the last access was in them
  std::vector<Access> writes, atomics, reads;
  bool settled = false;    // all threads know of all of `writes`, and there are no atomics
  uint64_t turn = 0;       // in it the thread that runs has found that it may read all of it,
  uint16_t now = 0;        // and has read these bytes: they are not in `reads` yet
  BlockAccesses own = {};  // the block that runs has made them
  std::vector<BlockAccesses> others;  // these blocks have written to it
  uint16_t others_read = 0;
};

// Keeps the lines of tensors that a grid has touched, by pages.
class Lines {
 public:
  Line& at(uint64_t begin) {
    const uint64_t page = begin / kPageBytes;
    Recent& recent = recent_[page % kRecent];
    if (recent.page != page) recent = {page, find(page)};
    return recent.lines[begin % kPageBytes / kLine];
  }

  // Gives the pages, with what was noted there, to other tensors.
  void clear() {
    for (const auto& [page, lines] : pages_) free_.push_back(lines);
    pages_.clear();
    std::fill(std::begin(recent_), std::end(recent_), Recent{});
  }

 private:
  static constexpr size_t kPageBytes = 4096, kRecent = 64;
  struct Recent {
    uint64_t page = ~uint64_t(0);
    Line* lines = nullptr;
  };

  Line* find(uint64_t page) {
    const auto [it, is_new] = pages_.try_emplace(page, nullptr);
    if (is_new && free_.empty()) free_.push_back(new Line[kPageBytes / kLine]);
    if (is_new) {
      it->second = free_.back();
      free_.pop_back();
    }
    return it->second;
  }

  std::unordered_map<uint64_t, Line*> pages_;
  std::vector<Line*> free_;
  Recent recent_[kRecent];
};

struct State {
  bool early = false;           // the launch may begin early
  int threads = 0;              // the block has so many
  int me = 0;                   // this thread runs
  unsigned number = 0;          // the block's, in its grid
  uint64_t block = 0, era = 0;  // they count from the beginning; an era ends when all threads meet
  uint64_t last_grid = 0;       // this block was the last before the grid

  uint32_t now[kMaxThreads];        // each thread's time
  uint32_t published[kMaxThreads];  // what it stored before is visible to tensor cores and copies
  bool waited[kMaxThreads];         // it has waited for the kernels before this one
  std::shared_ptr<Times> known[kMaxThreads];

  // These are for fences and atomic operations between blocks: who has fenced all that it stored,
  // which blocks have told at an address that they have, what of it was read, and fenced.
  bool fenced[kMaxThreads];
  std::map<const void*, std::vector<unsigned>> told;
  std::vector<unsigned> heard, acquired;

  Lines tensors;
  std::vector<Line> shared;
  uint64_t turn = 1;        // it counts from the beginning; a thread's ends when it meets others
  std::vector<Line*> read;  // they were read in this turn
};

State* const the_state = new State;  // it outlives static destructors
State& state() { return *the_state; }

bool is_shared(const void* p) { return offset_in_shared(p) < kAllSharedBytes; }

bool knows(const State& s, const Access& a) {
  if (a.time == kUnpublished) return false;
  return a.who == s.me || (*s.known[s.me])[a.who] >= a.time;
}

bool has_heard_of(const State& s, unsigned block) {
  return std::find(s.acquired.begin(), s.acquired.end(), block) != s.acquired.end();
}

Line& find(State& s, uint64_t begin, bool shared) {
  if (shared) return s.shared[offset_in_shared(reinterpret_cast<const void*>(begin)) / kLine];
  return s.tensors.at(begin);
}

// Finds the line, without what does not matter any more.
Line& line_at(State& s, uint64_t begin, bool shared) {
  Line& line = find(s, begin, shared);
  if (line.block != s.block) {
    if (shared || line.block <= s.last_grid) {
      line.others.clear();
      line.others_read = 0;
    } else {
      if ((line.own.written | line.own.updated) != 0) line.others.push_back(line.own);
      line.others_read |= line.own.read;
    }
    line.begin = begin, line.block = s.block, line.own = {s.number, 0, 0, 0};
    line.writes.clear(), line.atomics.clear(), line.reads.clear();
    line.settled = true;
  } else if (line.era != s.era) {
    // Of writes it may be asked yet whether they were fenced.
    line.atomics.clear(), line.reads.clear();
    line.settled = std::all_of(line.writes.begin(), line.writes.end(), [&](const Access& a) {
      return a.who < s.threads && a.time != kUnpublished;
    });
  }
  line.era = s.era;
  return line;
}

std::string describe(const void* p) {
  return is_shared(p) ? "byte " + std::to_string(offset_in_block(p)) + " of shared memory"
                      : describe_address(p);
}

std::string describe(const Line& line, uint16_t bytes) {
  return describe(reinterpret_cast<const char*>(line.begin) + __builtin_ctz(bytes));
}

std::string describe(const State& s, const Access& a) {
  if (a.who >= s.threads) return "a bulk copy";
  return a.time == kUnpublished ? "a cp.async that " + name_of_thread(a.who) + " has not waited for"
                                : name_of_thread(a.who);
}

[[noreturn]] void fail_race(const Line& line, uint16_t bytes, const char* does,
                            const std::string& other, const char* did) {
  fail(std::string(does) + " " + describe(line, bytes) + ", which " + other + " has " + did +
       ", and nothing orders the two (" + last_place() + ")");
}

void check_order(const State& s, const Line& line, const std::vector<Access>& others,
                 uint16_t bytes, const char* does, const char* did) {
  for (const Access& a : others) {
    const uint16_t both = a.bytes & bytes;
    if (both != 0 && !knows(s, a)) fail_race(line, both, does, describe(s, a), did);
  }
}

// Notes an access: of one thread and the same bytes only the last is of interest.
void add(std::vector<Access>& all, const Access& a) {
  if (!all.empty() && all.back().who == a.who && all.back().time == a.time) {
    all.back().bytes |= a.bytes;
    return;
  }
  all.push_back(a);
  const size_t size = all.size();
  if (size < 2 * kMaxThreads || (size & (size - 1)) != 0) return;
  const auto key = [](const Access& x) { return uint32_t(x.who) << 16 | x.bytes; };
  std::stable_sort(all.begin(), all.end(),
                   [&](const Access& x, const Access& y) { return key(x) < key(y); });
  const auto kept = std::unique(all.rbegin(), all.rend(),
                                [&](const Access& x, const Access& y) { return key(x) == key(y); });
  all.erase(all.begin(), kept.base());
}

void forget(std::vector<Access>& all, uint16_t bytes) {
  for (Access& a : all) a.bytes &= uint16_t(~bytes);
  all.erase(std::remove_if(all.begin(), all.end(), [](const Access& a) { return a.bytes == 0; }),
            all.end());
}

// Notes what the thread has read of the line in its turn.
void note_reads(State& s, Line& line) {
  add(line.reads, {s.now[s.me], uint16_t(s.me), line.now});
  line.own.read |= line.now;
  line.turn = 0;
}

// Says whether the thread may read all bytes of the line.
bool may_read_all(const State& s, const Line& line) {
  const auto known = [&](const Access& a) { return knows(s, a); };
  return line.others.empty() &&
         (line.settled || (std::all_of(line.writes.begin(), line.writes.end(), known) &&
                           std::all_of(line.atomics.begin(), line.atomics.end(), known)));
}

enum class Verb { kRead, kWrite, kAtomic };

void touch(State& s, Verb verb, uint64_t begin, bool shared, Access own) {
  const uint16_t bytes = own.bytes;
  Line& line = line_at(s, begin, shared);
  if (line.turn == s.turn) note_reads(s, line);
  const char* const does = verb == Verb::kRead    ? "reads"
                           : verb == Verb::kWrite ? "writes"
                                                  : "updates";
  if (!line.settled) check_order(s, line, line.writes, bytes, does, "written");
  if (verb != Verb::kAtomic) check_order(s, line, line.atomics, bytes, does, "updated");
  if (verb != Verb::kRead) check_order(s, line, line.reads, bytes, does, "read");
  if (!shared) {
    if (s.early && !s.waited[s.me]) {
      fail(std::string(does) + " " + describe(line, bytes) +
           " before it has waited for the kernels before this one");
    }
    for (const BlockAccesses& other : line.others) {
      const uint16_t changed =
          verb == Verb::kAtomic ? other.written : other.written | other.updated;
      if ((changed & bytes) != 0 && !has_heard_of(s, other.block)) {
        fail_race(line, changed & bytes, does, "another block", "changed");
      }
    }
    if (verb != Verb::kRead && (line.others_read & bytes) != 0) {
      fail_race(line, line.others_read & bytes, does, "another block", "read");
    }
  }
  switch (verb) {
    case Verb::kRead:
      add(line.reads, own);
      line.own.read |= bytes;
      break;
    case Verb::kWrite:
      forget(line.writes, bytes), forget(line.atomics, bytes), forget(line.reads, bytes);
      add(line.writes, own);
      line.settled = false;
      line.own.written |= bytes;
      if (!shared) s.fenced[s.me] = false;
      break;
    case Verb::kAtomic:
      add(line.atomics, own);
      line.settled = false;
      line.own.updated |= bytes;
      break;
  }
}

// Calls f(begin of the line, its bytes) for all lines.
template <typename F>
void for_each_line(const void* p, size_t bytes, const F& f) {
  const uint64_t first = reinterpret_cast<uintptr_t>(p), end = first + bytes;
  for (uint64_t begin = first / kLine * kLine; begin < end; begin += kLine) {
    const unsigned low = unsigned(first > begin ? first - begin : 0);
    const unsigned high = unsigned(std::min<uint64_t>(end - begin, kLine));
    f(begin, uint16_t((1u << high) - (1u << low)));
  }
}

void touch_all(Verb verb, const void* p, size_t bytes) {
  const bool shared = is_shared(p);
  if (!shared && !is_guarded(p)) return;
  State& s = state();
  for_each_line(p, bytes, [&](uint64_t begin, uint16_t mask) {
    touch(s, verb, begin, shared, {s.now[s.me], uint16_t(s.me), mask});
  });
}

// Does most of what kernels do: what the thread knows to be readable is soon done with.
void read_line(State& s, uint64_t begin, uint16_t bytes, bool shared) {
  Line& line = find(s, begin, shared);
  if (line.turn == s.turn) {
    line.now |= bytes;
    return;
  }
  if (line.era != s.era || !line.settled || !line.others.empty() || s.early) {
    touch(s, Verb::kRead, begin, shared, {s.now[s.me], uint16_t(s.me), bytes});
    if (!may_read_all(s, line)) return;
  }
  line.turn = s.turn, line.now = bytes;
  s.read.push_back(&line);
}

// Stores that tensor cores or copies are to see, or to write behind, need a fence.
void check_is_fenced(State& s, const void* p, size_t bytes, const char* does) {
  for_each_line(p, bytes, [&](uint64_t begin, uint16_t mask) {
    const Line& line = line_at(s, begin, true);
    for (const Access& a : line.writes) {
      const uint16_t both = a.bytes & mask;
      if (both == 0 || a.who >= s.threads || a.time < s.published[a.who]) continue;
      fail(std::string(does) + " " + describe(line, both) + ", which " + describe(s, a) +
           " has stored without a fence for it (" + last_place() + ")");
    }
  });
}

}  // namespace

void add_times(Times& times, const Times& more) {
  times.resize(std::max(times.size(), more.size()));
  for (size_t i = 0; i < more.size(); ++i) times[i] = std::max(times[i], more[i]);
}

void begin_grid_accesses(bool early) {
  State& s = state();
  s.early = early;
  s.last_grid = s.block;
  s.tensors.clear();
  s.told.clear();
}

void begin_block_accesses(int threads, unsigned number) {
  State& s = state();
  s.threads = threads, s.number = number;
  ++s.block, ++s.era;
  s.shared.resize(kAllSharedBytes / kLine);
  const auto nothing = std::make_shared<Times>(threads + kMaxMbarriers);
  for (int i = 0; i < threads; ++i) {
    s.now[i] = 1, s.published[i] = 0;
    s.waited[i] = s.fenced[i] = false;
    s.known[i] = nothing;
  }
  s.heard.clear(), s.acquired.clear();
  s.read.clear(), ++s.turn;  // a launch that failed may have left some
}

void begin_turn(int thread) { state().me = thread; }

void end_turn() {
  State& s = state();
  for (Line* line : s.read) {
    if (line->turn == s.turn && line->now != 0) note_reads(s, *line);
  }
  s.read.clear();
  ++s.turn;
}

void order_threads(const std::vector<int>& threads) {
  end_turn();
  State& s = state();
  std::shared_ptr<Times> all = s.known[threads[0]];
  const auto has_it = [&](int i) { return s.known[i] == all; };
  const bool theirs_alone = std::all_of(threads.begin(), threads.end(), has_it) &&
                            all.use_count() == long(threads.size()) + 1;
  if (!theirs_alone) {
    const Times* last = all.get();
    all = std::make_shared<Times>(*all);
    for (const int i : threads) {  // neighbours mostly know the same
      if (s.known[i].get() == last) continue;
      last = s.known[i].get();
      add_times(*all, *last);
    }
  }
  for (const int i : threads) (*all)[size_t(i)] = s.now[i]++;
  for (const int i : threads) s.known[i] = all;
  if (int(threads.size()) == s.threads) ++s.era;
}

void order_lanes(unsigned mask) {
  std::vector<int> lanes;
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) lanes.push_back(thread() / kWarp * kWarp + i);
  }
  order_threads(lanes);
}

void check_has_waited() {
  const State& s = state();
  if (s.early && !s.waited[s.me]) {
    fail("ends without having waited for the kernels before this one");
  }
}

void wait_for_predecessors() { state().waited[thread()] = true; }

void note_read(const void* p, size_t bytes) {
  const bool shared = is_shared(p);
  if (!shared && !is_guarded(p)) return;
  State& s = state();
  for_each_line(p, bytes,
                [&](uint64_t begin, uint16_t mask) { read_line(s, begin, mask, shared); });
}

// Does the same, for what is mostly shared memory that has been read in this turn already.
template <size_t kBytes>
void read(const void* p) {
  State& s = state();
  const size_t offset = offset_in_shared(p), within = offset % kLine;
  if (offset < kAllSharedBytes && within + kBytes <= kLine) {
    if (Line& line = s.shared[offset / kLine]; line.turn == s.turn) {
      line.now |= uint16_t(((1u << kBytes) - 1) << within);
      return;
    }
  }
  note_read(p, kBytes);
}

void note_write(const void* p, size_t bytes) { touch_all(Verb::kWrite, p, bytes); }

void note_atomic(const void* p, size_t bytes) {
  touch_all(Verb::kAtomic, p, bytes);
  if (is_shared(p)) return;
  State& s = state();
  std::vector<unsigned>& told = s.told[p];
  s.heard.insert(s.heard.end(), told.begin(), told.end());
  if (s.fenced[s.me]) told.push_back(s.number);
}

void thread_fence() {
  State& s = state();
  s.fenced[s.me] = true;
  s.acquired.insert(s.acquired.end(), s.heard.begin(), s.heard.end());
  s.heard.clear();
}

void release_into(Times& times) {
  end_turn();
  State& s = state();
  add_times(times, *s.known[s.me]);
  times[size_t(s.me)] = s.now[s.me]++;
}

void acquire_from(const Times& times) {
  State& s = state();
  const Times& own = *s.known[s.me];
  bool news = false;
  for (size_t i = 0; i < times.size() && !news; ++i) news = times[i] > own[i];
  if (!news) return;
  s.known[s.me] = std::make_shared<Times>(own);  // others may share the old ones
  add_times(*s.known[s.me], times);
}

void begin_copy_write(const void* p, size_t bytes) {
  State& s = state();
  for_each_line(p, bytes, [&](uint64_t begin, uint16_t mask) {
    touch(s, Verb::kWrite, begin, true, {kUnpublished, uint16_t(s.me), mask});
  });
}

void end_copy_write(const void* p, size_t bytes) {
  State& s = state();
  for_each_line(p, bytes, [&](uint64_t begin, uint16_t mask) {
    for (Access& a : line_at(s, begin, true).writes) {
      const bool own = a.who == s.me && a.time == kUnpublished;
      if (own && (a.bytes & mask) != 0) a.time = s.now[s.me];
    }
  });
}

void note_engine_read(const void* p, size_t bytes) {
  if (is_shared(p)) check_is_fenced(state(), p, bytes, "lets tensor cores or a copy read");
  note_read(p, bytes);
}

void note_bulk_copy(const void* to, const void* from, size_t bytes, int mbarrier, uint32_t phase) {
  State& s = state();
  const uint16_t who = uint16_t(s.threads + mbarrier);
  check_is_fenced(s, to, bytes, "lets a copy write to");
  for_each_line(to, bytes, [&](uint64_t begin, uint16_t mask) {
    touch(s, Verb::kWrite, begin, true, {phase, who, mask});
  });
  if (!is_guarded(from)) return;
  for_each_line(from, bytes, [&](uint64_t begin, uint16_t mask) {
    touch(s, Verb::kRead, begin, false, {phase, who, mask});
  });
}

void set_phase_over(Times& times, int mbarrier, uint32_t phase) {
  const State& s = state();
  times.resize(size_t(s.threads + kMaxMbarriers));
  times[size_t(s.threads + mbarrier)] = phase;
}

void check_mbarrier_is_there(const void* p) {
  State& s = state();
  for_each_line(p, sizeof(uint64_t), [&](uint64_t begin, uint16_t mask) {
    const Line& line = line_at(s, begin, true);
    check_order(s, line, line.writes, mask, "uses", "written");
  });
}

void publish_shared() {
  end_turn();
  State& s = state();
  s.published[s.me] = ++s.now[s.me];
}

}  // namespace specextend::emulation

// --- what kernels are compiled to call where they read and write memory (-fsanitize=thread) ---

#define SPECEXTEND_HOOKS(bytes)                                                                 \
  extern "C" void __tsan_read##bytes(void* p) { specextend::emulation::read<bytes>(p); }        \
  extern "C" void __tsan_write##bytes(void* p) { specextend::emulation::note_write(p, bytes); } \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                       \
    specextend::emulation::note_read(p, bytes);                                                 \
  }                                                                                             \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                      \
    specextend::emulation::note_write(p, bytes);                                                \
  }
SPECEXTEND_HOOKS(1)
SPECEXTEND_HOOKS(2)
SPECEXTEND_HOOKS(4)
SPECEXTEND_HOOKS(8)
SPECEXTEND_HOOKS(16)
#undef SPECEXTEND_HOOKS
extern "C" void __tsan_read_range(void* p, size_t bytes) {
  specextend::emulation::note_read(p, bytes);
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  specextend::emulation::note_write(p, bytes);
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
