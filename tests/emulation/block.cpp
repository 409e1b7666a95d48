// The scheduler runs the blocks of a grid one after the other, the threads of a block as fibers.

#include "emulation/block.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "fiber.h"
#include "host.h"
#include "races.h"
#include "run.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace specextend::emulation {

Settings settings;
const unsigned char* all_shared;

namespace {

constexpr int kBarriers = 16;
constexpr int kSecondsPerBlock = 60;
constexpr const char* kExpired = "the block has run for a minute; does it wait for another one?";
constexpr int kFairPolls = 1024;  // from here on no thread is favoured
constexpr int kMaxPolls = 1 << 22;
constexpr size_t kSharedGuardBytes = 16 << 20;
constexpr size_t kSharedAlignment = 1024;

struct Place {
  const char* name = "";
  const char* file = "";
  int line = 0;

  bool operator==(const Place& o) const {
    const auto same = [](const char* a, const char* b) { return a == b || strcmp(a, b) == 0; };
    return line == o.line && same(file, o.file) && same(name, o.name);
  }
  std::string string() const {
    return std::string(name) + " (" + file + ":" + std::to_string(line) + ")";
  }
};

enum class State { kReady, kInWarp, kAtBarrier, kExited };

struct Thread {
  Fiber fiber;
  uint3 index;
  State state;
  Place place;    // it waits here
  unsigned mask;  // a warp call gives it
  void* operand;  // likewise
  int barrier;    // it waits at this one
  int sum;        // the barrier gave it
};

struct Barrier {
  int threads, arrived, sum;
  bool uniform;
  std::vector<int> waiting;
};

// Holds everything about the launch that runs; there is one at a time.
struct Run {
  std::mutex mutex;
  Thread threads[kMaxThreads];
  unsigned char* shared_end;  // all shared memory ends here; a guard follows, and one comes before
  unsigned char* shared;      // the cluster's first block has its own here
  size_t shared_bytes, shared_stride;  // a block has so many bytes; the next one's lie so far on
  size_t shared_open;                  // so many bytes before the end may be touched

  std::string kernel, error;
  void (*body)(void*);
  void* argument;
  int count, block_threads, exited, current, polls;  // the cluster has `count` threads
  unsigned ready[kMaxThreads / kWarp];               // these lanes of each warp can go on
  unsigned ready_warps;
  unsigned calling[kMaxThreads / kWarp];          // these lanes of each warp wait in a warp call
  Barrier barriers[kMaxCluster * kBarriers + 1];  // each block has its own; the cluster's is last
  int favourite_warp, favourite_lane;
  uint64_t random;

  pthread_t host;
  sigjmp_buf abandon;
  volatile bool expired;  // a block has used up its time
  int signal;
  void* address;

  Run() {
    const size_t bytes = round_to_pages(kMaxCluster * kMaxSharedBytes);
    void* memory = mmap(nullptr, bytes + 2 * kSharedGuardBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    shared_end = static_cast<unsigned char*>(memory) + kSharedGuardBytes + bytes;
    all_shared = shared_end - kAllSharedBytes;
    shared_open = 0;
  }

  Thread& me() { return threads[current]; }
  int rank() const { return current / block_threads; }  // the block's, in the cluster

  uint64_t next() {  // splitmix64
    uint64_t x = random += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }

  void set_ready(int thread) {
    threads[thread].state = State::kReady;
    ready[thread / kWarp] |= 1u << thread % kWarp;
    ready_warps |= 1u << thread / kWarp;
  }

  void set_waiting(State state, const Place& place) {
    me().state = state;
    me().place = place;
    ready[current / kWarp] &= ~(1u << current % kWarp);
    if (ready[current / kWarp] == 0) ready_warps &= ~(1u << current / kWarp);
  }

  // Chooses one of the bits, as the schedule wants it.
  int choose(unsigned bits, int favourite) {
    const unsigned favoured = polls < kFairPolls ? bits & 1u << favourite : 0;
    if (settings.kind == Kind::kAhead && favoured) return favourite;
    if (settings.kind == Kind::kBehind && bits != favoured) bits &= ~favoured;
    const unsigned turn = unsigned(next() >> 32) % 32;
    const unsigned turned = bits >> turn | bits << (32 - turn) % 32;
    return (__builtin_ctz(turned) + int(turn)) % 32;
  }

  void run_block();
  std::string report() const;
  std::string where() const;
};

Run& run() {
  static Run* const the_run = new Run;  // its stacks outlive static destructors
  return *the_run;
}

std::string triple(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string Run::where() const {
  return kernel + ", block " + triple(blockIdx) + ", thread " + triple(threads[current].index) +
         ": ";
}

// Writes "0-31, 40".
std::string ranges(const std::vector<int>& sorted) {
  std::string text;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(sorted[i]);
    if (j > i) text += "-" + std::to_string(sorted[j]);
    i = j + 1;
  }
  return text;
}

// Says who waits where, when nobody can go on.
std::string Run::report() const {
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < count; ++i) {
    const Thread& t = threads[i];
    std::string what = "have ended";
    char mask[32];
    if (t.state == State::kInWarp) {
      snprintf(mask, sizeof(mask), "0x%08x", t.mask);
      what = "wait at " + t.place.string() + " for lanes " + mask;
    } else if (t.state == State::kAtBarrier) {
      what = "wait at " + t.place.string() + " for " + std::to_string(barriers[t.barrier].threads) +
             " threads at barrier " + std::to_string(t.barrier % kBarriers);
    }
    groups[what].push_back(i);
  }
  std::string text = kernel + ", block " + triple(blockIdx) + ": no thread can go on";
  for (const auto& [what, who] : groups) text += "; threads " + ranges(who) + " " + what;
  return text;
}

void thread_main(void*) {
  Run& r = run();
  r.body(r.argument);
  end_copies_of_thread();
  check_has_waited();
  r.set_waiting(State::kExited, {});
  ++r.exited;
  r.me().fiber.suspend();
}

void Run::run_block() {
  exited = polls = 0;
  ready_warps = 0;
  std::fill(std::begin(ready), std::end(ready), 0);
  std::fill(std::begin(calling), std::end(calling), 0);
  for (Barrier& b : barriers) {
    b.arrived = b.sum = 0;
    b.waiting.clear();
  }
  const int warps = (count + kWarp - 1) / kWarp;
  favourite_warp = int((next() >> 32) % unsigned(warps));
  favourite_lane = int((next() >> 32) % kWarp);
  for (int i = 0; i < count; ++i) {
    threads[i].fiber.start(thread_main, nullptr);
    threads[i].place = {};
    set_ready(i);
  }
  memset(shared_end - shared_open, kPoison, shared_open);
  forget_copies(count);
  forget_products(count);
  begin_block_accesses(count, (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
  const unsigned first = blockIdx.x;  // the cluster begins with it
  while (exited < count && error.empty()) {
    if (ready_warps == 0) {
      error = report();
      return;
    }
    if (expired) {
      error = where() + kExpired;
      return;
    }
    const int warp = choose(ready_warps, favourite_warp);
    current = warp * kWarp + choose(ready[warp], favourite_lane);
    threadIdx = me().index;
    blockIdx.x = first + unsigned(rank());
    begin_turn(current);
    me().fiber.resume();
    end_turn();
  }
  const auto untouched = [](const unsigned char* begin, const unsigned char* end) {
    return std::all_of(begin, end, [](unsigned char c) { return c == kPoison; });
  };
  bool clean = untouched(shared_end - shared_open, shared);
  for (const unsigned char* own = shared; own < shared_end; own += shared_stride) {
    clean &= untouched(own + shared_bytes, own + shared_stride);
  }
  if (error.empty() && !clean) {
    error = kernel + ", block " + triple(blockIdx) +
            ": a write next to shared memory, of which it has " + std::to_string(shared_bytes) +
            " bytes";
  }
}

// --- faults ---

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGVTALRM};

void set_timer(int seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = seconds;
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void on_signal(int signal, siginfo_t* info, void*) {
  Run& r = run();
  if (!pthread_equal(pthread_self(), r.host)) {
    if (signal == SIGVTALRM) {
      pthread_kill(r.host, signal);
    } else {
      ::signal(signal, SIG_DFL);  // it is not ours: it comes again as soon as this returns
    }
    return;
  }
  if (signal == SIGVTALRM && !r.expired) {  // the scheduler ends the block, if a thread gets there
    r.expired = true;
    set_timer(1);
    return;
  }
  r.signal = signal;
  r.address = info->si_addr;
  siglongjmp(r.abandon, 1);
}

// Sets signal handlers while a grid runs, on a stack of their own.
class Handlers {
 public:
  Handlers() {
    static unsigned char* const memory = new unsigned char[64 * 1024];
    stack_t stack{};
    stack.ss_sp = memory;
    stack.ss_size = 64 * 1024;
    sigaltstack(&stack, &stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Handlers() {
    set_timer(0);
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_, nullptr);
  }

 private:
  stack_t stack_{};
  struct sigaction before_[std::size(kSignals)];
};

std::string describe_fault(const Run& r) {
  switch (r.signal) {
    case SIGVTALRM:
      return kExpired;
    case SIGFPE:
      return "an integer division by zero";
    case SIGILL:
      return "a trap";
    case SIGABRT:
      return "an assertion that does not hold";
  }
  const auto* address = static_cast<const unsigned char*>(r.address);
  if (address >= r.shared_end - kMaxCluster * kMaxSharedBytes - kSharedGuardBytes &&
      address < r.shared_end + kSharedGuardBytes) {
    return "access to byte " + std::to_string(address - r.shared) +
           " of shared memory, which has " + std::to_string(r.shared_bytes) + " bytes";
  }
  for (int i = 0; i < r.count; ++i) {
    if (r.threads[i].fiber.overflows(address)) return "stack overflow";
  }
  return "access to " + describe_address(address);
}

// Writes "merge_states_kernel<float, 4>".
std::string kernel_name(const void* kernel) {
  Dl_info info{};
  dladdr(kernel, &info);
  const char* name = info.dli_sname;
  if (name == nullptr) return "a kernel";
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  free(text);
  // Of "void specextend::kernel<...>(specextend::Params)" type, namespace and parameters go.
  if (result.rfind("void ", 0) == 0) result.erase(0, 5);
  if (!result.empty() && result.back() == ')') {
    int depth = 0;
    size_t i = result.size();
    do {
      --i;
      depth += result[i] == ')' ? 1 : result[i] == '(' ? -1 : 0;
    } while (i > 0 && depth > 0);
    result.erase(i);
  }
  for (size_t at; (at = result.find("specextend::")) != std::string::npos;) result.erase(at, 12);
  return result;
}

// Makes inaccessible the memory in front of what the cluster has.
void open_shared(Run& r, size_t bytes, size_t cluster) {
  const size_t aligned = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  const size_t open = round_to_pages(cluster * aligned);
  r.shared_bytes = bytes;
  r.shared_stride = aligned > 0 ? aligned : 1;
  r.shared = r.shared_end - cluster * aligned;
  if (open != r.shared_open) {
    const size_t all = round_to_pages(kMaxCluster * kMaxSharedBytes);
    if (mprotect(r.shared_end - all, all - open, PROT_NONE) != 0 ||
        mprotect(r.shared_end - open, open, PROT_READ | PROT_WRITE) != 0) {
      abort();
    }
    r.shared_open = open;
  }
}

}  // namespace

const std::string& last_error() { return run().error; }

cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_t& config, void (*body)(void*),
                     void* argument) {
  Run& r = run();
  const std::lock_guard<std::mutex> lock(r.mutex);
  if (const cudaError_t error = check_launch_config(kernel, config)) return error;
  const dim3 grid = config.gridDim, block = config.blockDim;
  r.kernel = kernel_name(kernel);
  r.error.clear();
  r.body = body;
  r.argument = argument;
  const unsigned cluster = cluster_of(config);
  r.block_threads = int(block.x * block.y * block.z);
  r.count = r.block_threads * int(cluster);
  r.random = settings.seed * 2 + 1;
  gridDim = grid;
  blockDim = block;
  for (int i = 0; i < r.count; ++i) {
    const unsigned x = unsigned(i % r.block_threads);
    r.threads[i].index = {x % block.x, x / block.x % block.y, x / block.x / block.y};
  }
  open_shared(r, config.dynamicSmemBytes, cluster);

  const unsigned across = grid.x / cluster;
  std::vector<uint64_t> order(uint64_t(across) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[r.next() % i]);

  begin_grid_accesses(is_early(config));
  Handlers handlers;
  r.host = pthread_self();
  if (sigsetjmp(r.abandon, 1) == 0) {
    for (const uint64_t i : order) {
      blockIdx = {unsigned(i % across) * cluster, unsigned(i / across % grid.y),
                  unsigned(i / across / grid.y)};
      r.expired = false;
      set_timer(kSecondsPerBlock);
      r.run_block();
      if (!r.error.empty()) return cudaErrorLaunchFailure;
    }
    if (const std::string damage = find_damage(); !damage.empty()) {
      r.error = r.kernel + ": a write next to " + damage;
      return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
  }
  r.error = r.where() + describe_fault(r);
  return cudaErrorIllegalAddress;
}

void fail(const std::string& what) {
  Run& r = run();
  r.error = r.where() + what;
  r.me().fiber.suspend();  // for ever
  abort();
}

unsigned lane() { return unsigned(run().current) % kWarp; }

unsigned draw(unsigned bound) { return unsigned(run().next() >> 32) % bound; }

int yield() {
  Run& r = run();
  if (++r.polls == kMaxPolls) {
    fail("waits without end for what no thread of the block does; for another block?");
  }
  if (settings.kind != Kind::kRandom || draw(4) == 0) r.me().fiber.suspend();
  return r.polls;
}

void note_progress() { run().polls = 0; }

int thread() { return run().current; }

std::string name_of_thread(int thread) {
  const Run& r = run();
  const std::string name = "thread " + triple(r.threads[thread].index);
  return r.count == r.block_threads || thread / r.block_threads == r.rank()
             ? name
             : name + " of the cluster's other block";
}

std::string last_place() {
  const Place& place = run().me().place;
  return place.line == 0 ? "before it has met any other" : "behind " + place.string();
}

size_t offset_in_block(const void* p) {
  const Run& r = run();
  return size_t(static_cast<const unsigned char*>(p) - r.shared) % r.shared_stride;
}

void warp_call(const char* name, const char* file, int line, unsigned mask, void* operand,
               void (*function)(void* const* operands, unsigned mask)) {
  Run& r = run();
  Thread& me = r.me();
  const Place place{name, file, line};
  const int first = r.current / kWarp * kWarp, lanes = std::min(kWarp, r.count - first);
  if (!(mask >> lane() & 1)) fail(place.string() + ": the mask does not name the caller");
  if (lanes < kWarp && mask >> lanes != 0 && mask != 0xffffffffu) {
    fail(place.string() + ": the mask names lanes that the block does not have");
  }
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  me.mask = mask;
  me.operand = operand;
  r.set_waiting(State::kInWarp, place);
  unsigned& calling = r.calling[r.current / kWarp];
  calling |= 1u << lane();
  void* operands[kWarp] = {};
  bool all = (calling & mask) == mask;
  for (int i = 0; i < lanes && all; ++i) {
    if (!(mask >> i & 1)) continue;
    const Thread& t = r.threads[first + i];
    all = t.mask == mask && t.place == place;
    operands[i] = t.operand;
  }
  if (all) {
    function(operands, mask);
    calling &= ~mask;
    for (int i = 0; i < lanes; ++i) {
      if (mask >> i & 1) r.set_ready(first + i);
    }
    r.polls = 0;
  }
  me.fiber.suspend();
}

namespace {

// Waits until `threads` have come to the barrier, and gives the sum of their values.
int meet(const Place& place, int barrier, int threads, bool uniform, int value) {
  Run& r = run();
  Thread& me = r.me();
  Barrier& b = r.barriers[barrier];
  if (b.arrived > 0) {
    const Place& other = r.threads[b.waiting[0]].place;
    if (b.threads != threads) {
      fail(place.string() + " wants " + std::to_string(threads) + " threads, others that wait at " +
           other.string() + " want " + std::to_string(b.threads));
    }
    if ((uniform || b.uniform) && !(place == other)) {
      fail("divergence: one thread is at " + place.string() + ", others wait at " + other.string());
    }
  }
  maybe_land_early();
  b.threads = threads;
  b.uniform = uniform;
  b.sum += value;
  b.waiting.push_back(r.current);
  me.barrier = barrier;
  r.set_waiting(State::kAtBarrier, place);
  if (++b.arrived == threads) {
    order_threads(b.waiting);
    for (const int i : b.waiting) {
      r.threads[i].sum = b.sum;
      r.set_ready(i);
    }
    b.waiting.clear();
    b.arrived = b.sum = 0;
    r.polls = 0;
  }
  me.fiber.suspend();
  return me.sum;
}

}  // namespace

int barrier(const char* name, const char* file, int line, int id, int threads, bool uniform,
            int value) {
  Run& r = run();
  const Place place{name, file, line};
  if (threads == 0) threads = r.block_threads;
  if (id < 0 || id >= kBarriers)
    fail(place.string() + ": there is no barrier " + std::to_string(id));
  if (id > 0 && threads % kWarp != 0) fail(place.string() + ": threads must be whole warps");
  return meet(place, r.rank() * kBarriers + id, threads, uniform, value);
}

void cluster_barrier(const char* name, const char* file, int line) {
  meet({name, file, line}, kMaxCluster * kBarriers, run().count, true, 0);
}

int cluster_rank() { return run().rank(); }

void* in_cluster(void* p, int rank) {
  check_shared("a distributed shared memory address", p, 1);
  if ((rank + 1) * run().block_threads > run().count || rank < 0)
    fail("a block that the cluster lacks");
  return static_cast<char*>(p) + (rank - run().rank()) * int64_t(run().shared_stride);
}

unsigned char* shared_memory() {
  const Run& r = run();
  return r.shared + size_t(r.rank()) * r.shared_stride;
}

void check_shared(const char* what, const void* p, size_t bytes) {
  const Run& r = run();
  const auto* address = static_cast<const unsigned char*>(p);
  int64_t offset = address - r.shared;  // it may be in any of the cluster's blocks
  if (offset > 0 && address < r.shared_end) offset %= int64_t(r.shared_stride);
  if (offset < 0 || offset + int64_t(bytes) > int64_t(r.shared_bytes)) {
    fail(std::string(what) + " at byte " + std::to_string(offset) +
         " of shared memory, which has " + std::to_string(r.shared_bytes) + " bytes");
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail(std::string(what) + " at byte " + std::to_string(offset) +
         " of shared memory, which is not a multiple of " + std::to_string(bytes));
  }
}

}  // namespace specextend::emulation

// --- what kernels are compiled to call where they do what the language does not allow ---

namespace {

struct SourceLocation {
  const char* file;
  unsigned line, column;
};

[[noreturn]] void fail_at(const char* what, const void* location) {
  const auto* at = static_cast<const SourceLocation*>(location);
  specextend::emulation::fail(std::string(what) + " (" + at->file + ":" + std::to_string(at->line) +
                              ")");
}

}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* location, void*) {
  fail_at("access to a misaligned address", location);
}
extern "C" void __ubsan_handle_out_of_bounds_abort(void* location, void*) {
  fail_at("an index beyond the end of an array", location);
}
extern "C" void __ubsan_handle_shift_out_of_bounds_abort(void* location, void*, void*) {
  fail_at("a shift by more bits than there are", location);
}
