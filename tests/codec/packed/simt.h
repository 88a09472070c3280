// Runs CUDA kernels on one thread of a CPU (simt.py builds them). A block's threads are fibers that run one after another,
// each until it has to meet others: at a barrier of the block, or at a shuffle, vote or barrier of its warp. What a GPU
// would silently get wrong ends the launch with a message: threads that wait for others which never come, shuffles
// from lanes that take no part, misaligned accesses, indexes beyond a declared array, shifts by too much.
//
// Stricter than a GPU: threads that meet must be on the same line, and none of them may have returned. Blind to memory
// shared by accident: of two threads that race, the one with the lower number wins, or with `backward` the higher one.
#pragma once
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

namespace simt {
constexpr int kMaxThreads = 1024, kWarp = 32;
constexpr size_t kStack = 256 << 10;

struct Index {
  unsigned x, y, z;
};

enum State { kReady, kAtBlock, kAtWarp, kEnded };
enum Meeting { kBarrier, kBallot, kShuffle };

// What a thread brings when it meets others, and what it takes away.
struct Fiber {
  ucontext_t context;
  State state;
  int line;
  Meeting meeting;
  unsigned mask, source;  // `source`: the lane that a shuffle reads
  uint64_t value, result;
};

inline Fiber fibers[kMaxThreads];
inline ucontext_t host;
inline unsigned count, current;  // threads of a block; the running one
inline void (*body)(void**);
inline void** arguments;
inline char message[256];
}  // namespace simt

inline simt::Index threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
// Ends the launch from within a thread.
template <class... T>
[[noreturn]] __attribute__((noinline)) void fail(const char* format, T... values) {
  const int n = std::snprintf(message, sizeof message, "block %u, thread %u: ", blockIdx.x, current);
  std::snprintf(message + n, sizeof message - n, format, values...);
  setcontext(&host);
  __builtin_unreachable();
}

__attribute__((noinline)) inline uint64_t meet(State state, int line, Meeting meeting, unsigned mask, uint64_t value,
                                               unsigned source) {
  Fiber& f = fibers[current];
  f.state = state, f.line = line, f.meeting = meeting, f.mask = mask, f.value = value, f.source = source;
  if (state == kAtWarp && !(mask >> current % kWarp & 1)) fail("line %d: lane is not in its own mask %#x", line, mask);
  swapcontext(&f.context, &host);
  return f.result;
}

inline void enter() {
  body(arguments);
  fibers[current].state = kEnded;
  setcontext(&host);
}

// Lets the lanes go that `lane` names, if all have come to the same place; false if they have not.
inline bool release_warp(unsigned thread) {
  const Fiber& first = fibers[thread];
  Fiber* const warp = fibers + thread / kWarp * kWarp;
  const unsigned lanes = count - thread / kWarp * kWarp;
  uint64_t votes = 0;
  for (unsigned i = 0; i < (unsigned)kWarp; i++) {
    if (!(first.mask >> i & 1)) continue;
    const Fiber& f = warp[i];
    if (i >= lanes || f.state != kAtWarp || f.meeting != first.meeting || f.mask != first.mask || f.line != first.line)
      return false;
    votes |= (uint64_t)(f.value != 0) << i;
  }
  for (unsigned i = 0; i < (unsigned)kWarp; i++)
    if (first.mask >> i & 1 && first.meeting == kShuffle && !(first.mask >> warp[i].source & 1)) {
      std::snprintf(message, sizeof message, "block %u, line %d: lane %u reads lane %u, which takes no part", blockIdx.x,
                    first.line, i, warp[i].source);
      return false;
    }
  const unsigned mask = first.mask;
  for (unsigned i = 0; i < (unsigned)kWarp; i++) {
    if (!(mask >> i & 1)) continue;
    Fiber& f = warp[i];
    f.result = f.meeting == kBallot ? votes : warp[f.source].value;
    f.state = kReady;
  }
  return true;
}

inline bool release_block() {
  for (unsigned i = 0; i < count; i++)
    if (fibers[i].state != kAtBlock || fibers[i].line != fibers[0].line) return false;
  for (unsigned i = 0; i < count; i++) fibers[i].state = kReady;
  return true;
}

inline void deadlock() {
  unsigned ended = 0, waiting = 0, other = 0;
  for (unsigned i = 0; i < count; i++) {
    ended += fibers[i].state == kEnded;
    if (fibers[i].state != kEnded && !waiting++) other = i;
  }
  const Fiber& f = fibers[other];
  unsigned same = 0;
  for (unsigned i = 0; i < count; i++) same += fibers[i].state == f.state && fibers[i].line == f.line;
  std::snprintf(message, sizeof message,
                "block %u: deadlock: thread %u waits for its %s at line %d; of %u threads %u wait there, %u elsewhere, "
                "%u have returned",
                blockIdx.x, other, f.state == kAtBlock ? "block" : "warp", f.line, count, same, waiting - same, ended);
}

// One block, until all its threads have returned or `message` says why they cannot.
inline void run_block(bool backward, char* stacks) {
  for (unsigned i = 0; i < count; i++) {
    Fiber& f = fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks + i * kStack;
    f.context.uc_stack.ss_size = kStack;
    makecontext(&f.context, enter, 0);
    f.state = kReady;
  }
  for (;;) {
    for (unsigned i = 0; i < count; i++) {
      current = backward ? count - 1 - i : i;
      if (fibers[current].state != kReady) continue;
      threadIdx = {current % blockDim.x, current / blockDim.x % blockDim.y, current / blockDim.x / blockDim.y};
      swapcontext(&host, &fibers[current].context);
      if (*message) return;
    }
    bool all_ended = true, released = release_block();
    for (unsigned i = 0; i < count && !*message; i++) {
      all_ended &= fibers[i].state == kEnded;
      released |= fibers[i].state == kReady || (fibers[i].state == kAtWarp && release_warp(i));
    }
    if (*message || all_ended) return;
    if (!released) return deadlock();
  }
}

// A kernel's arguments by kind (p: pointer, i: four bytes, q: eight), and how to call it with them.
template <class T>
constexpr char kind_of() {
  static_assert(std::is_pointer<T>::value || sizeof(T) == 4 || sizeof(T) == 8, "arguments are pointers and numbers");
  return std::is_pointer<T>::value ? 'p' : sizeof(T) == 4 ? 'i' : 'q';
}

template <auto kernel>
struct Call;
template <class... T, void (*kernel)(T...)>
struct Call<kernel> {
  static constexpr char kinds[] = {kind_of<T>()..., 0};
  template <size_t... i>
  static void apply(void** args, std::index_sequence<i...>) {
    kernel(*(T*)args[i]...);
  }
  static void run(void** args) { apply(args, std::index_sequence_for<T...>()); }
};

struct Kernel {
  const char *name, *kinds;
  void (*run)(void**);
  unsigned most;  // threads of a block, by its launch bounds
};
#define SIMT_KERNEL(name, most) {#name, simt::Call<name>::kinds, simt::Call<name>::run, most}

template <size_t n>
const Kernel* find(const Kernel (&kernels)[n], const char* name) {
  for (const Kernel& kernel : kernels)
    if (!std::strcmp(kernel.name, name)) return &kernel;
  return nullptr;
}

// What a block finds in shared memory is no zero and no other block's. A kernel's shared variables are thread-local here,
// and nothing else is but `anchor`, so all lie together in this library's thread-local storage. Static, since an inline
// variable is the same one in all libraries of a process.
static thread_local volatile char anchor;
static void poison_shared() {
  anchor = 0;  // there is no storage before it is used
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& part = info->dlpi_phdr[i];
          char* const at = (char*)info->dlpi_tls_data;
          if (part.p_type == PT_TLS && (char*)&anchor >= at && (char*)&anchor < at + part.p_memsz)
            std::memset(at, 0xA5, part.p_memsz);
        }
        return 0;
      },
      nullptr);
}

// Arguments as of cuLaunchKernel. Returns null, or what went wrong. Not for several threads at once.
inline const char* launch(const Kernel* kernel, const unsigned grid[3], const unsigned block[3], void** args,
                          bool backward) {
  const uint64_t threads = (uint64_t)block[0] * block[1] * block[2], blocks = (uint64_t)grid[0] * grid[1] * grid[2];
  if (!kernel || !threads || !blocks) return "no such kernel, or an empty grid or block";
  if (threads > kernel->most) return "more threads in a block than the kernel's launch bounds allow";
  char* stacks = (char*)mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for the stacks";
  *message = 0, count = (unsigned)threads, body = kernel->run, arguments = args;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  for (uint64_t i = 0; i < blocks && !*message; i++) {
    const uint64_t b = backward ? blocks - 1 - i : i;
    blockIdx = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / grid[0] / grid[1])};
    poison_shared();
    run_block(backward, stacks);
  }
  munmap(stacks, threads * kStack);
  return *message ? message : nullptr;
}

// What the compiler's checks call (-fsanitize=alignment,bounds,shift): in place of the run-time library of GCC and Clang.
struct Place {
  const char* file;
  uint32_t line, column;
};
}  // namespace simt

extern "C" {
inline __attribute__((used)) void __ubsan_handle_type_mismatch_v1(simt::Place* place, void* address) {
  simt::fail("line %u: misaligned address %p", place->line, address);
}
inline __attribute__((used)) void __ubsan_handle_out_of_bounds(simt::Place* place, void* index) {
  simt::fail("line %u: index %llu beyond its array", place->line, (unsigned long long)(uintptr_t)index);
}
inline __attribute__((used)) void __ubsan_handle_shift_out_of_bounds(simt::Place* place, void*, void* by) {
  simt::fail("line %u: shift by %llu", place->line, (unsigned long long)(uintptr_t)by);
}
}
