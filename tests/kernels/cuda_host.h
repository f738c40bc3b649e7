// CUDA C on a CPU, for tests: include this, then the kernels, and compile with g++ -std=c++17.
//
// Every CUDA thread of a block is a fiber (ucontext) with its own stack; blocks run one after another. A fiber
// runs until it waits for its warp or its block. Which fiber goes first is a schedule, and a correct kernel gives
// the same result in all of them:
//
//     schedule 0   first block, warp and lane first, each as far as it can
//     schedule 1   last block, warp and lane first
//
// Reported as errors: a wait that cannot end because other threads went elsewhere or ended; lanes of a warp that
// wait in different functions; a warp function without all 32 lanes. Shared memory is filled with garbage before
// every block, and allocated to the byte, so that AddressSanitizer sees what lies beyond its end.
//
// Not shown: races between threads that no schedule above separates, the memory model, asynchronous copies, speed.
#pragma once
#define ON_HOST 1

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// ---- the language -------------------------------------------------------------------------------------------

#undef __forceinline__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace host {

// ---- fibers -------------------------------------------------------------------------------------------------

enum class State { Ready, AtBlock, AtWarp, Done };
enum class Call { None, SyncWarp, Shuffle, MatrixProduct };   // what a lane waits for its warp in

struct Fiber {
  ucontext_t context;
  dim3 index;
  unsigned number = 0;              // in the block
  State state = State::Ready;
  Call call = Call::None;
  unsigned turn = 0;                // warp functions so far: picks one of two mailboxes
  uint64_t mail[2][3] = {};         // what this lane shows to its warp
  void* shadow = nullptr;           // AddressSanitizer's own stack
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  dim3 index, size, grid;
  unsigned char* shared = nullptr;
  void (*kernel)(const void*) = nullptr;
  const void* args = nullptr;
  const char* error = nullptr;
};

inline Block block;
inline int schedule = 0;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif
constexpr unsigned WARP = 32;

inline Fiber& self() { return *block.running; }
inline Fiber& lane_of_own_warp(unsigned lane) { return block.fibers[self().number / WARP * WARP + lane]; }

// AddressSanitizer has to be told of every change of stack.
inline void leave_for(void** shadow, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(shadow, stack, size);
#else
  (void)shadow, (void)stack, (void)size;
#endif
}
inline void arrived(void* shadow) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(shadow, nullptr, nullptr);
#else
  (void)shadow;
#endif
}

inline void wait(State state, Call call = Call::None) {
  Fiber& fiber = self();
  fiber.state = state, fiber.call = call;
  leave_for(&fiber.shadow, nullptr, 0);
  swapcontext(&fiber.context, &block.scheduler);
  arrived(fiber.shadow);
}

inline void fiber_main() {
  arrived(nullptr);
  block.kernel(block.args);
  self().state = State::Done;
  leave_for(nullptr, nullptr, 0);   // null: this stack is not needed any more
  swapcontext(&self().context, &block.scheduler);
}

inline void resume(Fiber& fiber) {
  block.running = &fiber;
  void* shadow = nullptr;
  leave_for(&shadow, fiber.context.uc_stack.ss_sp, STACK);
  swapcontext(&block.scheduler, &fiber.context);
  arrived(shadow);
}

// Show three numbers to the warp; returns the mailbox's number once all lanes have shown theirs. With two boxes
// one wait is enough: nobody reuses a box before all lanes have come to the next function, done with this one.
inline unsigned meet_warp(Call call, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
  Fiber& fiber = self();
  unsigned box = fiber.turn++ % 2;
  fiber.mail[box][0] = a, fiber.mail[box][1] = b, fiber.mail[box][2] = c;
  wait(State::AtWarp, call);
  return box;
}

// ---- the schedule -------------------------------------------------------------------------------------------

inline unsigned in_order(unsigned i, unsigned count) { return schedule == 0 ? i : count - 1 - i; }

// Run a warp until every lane waits for the block or is done. False if some lanes can never go on.
inline bool run_warp(unsigned first) {
  for (;;) {
    for (unsigned i = 0; i < WARP; i++) {
      Fiber& fiber = block.fibers[first + in_order(i, WARP)];
      if (fiber.state == State::Ready) resume(fiber);
    }
    unsigned waiting = 0;
    Call call = Call::None;
    for (unsigned i = 0; i < WARP; i++) {
      Fiber& fiber = block.fibers[first + i];
      if (fiber.state != State::AtWarp) continue;
      if (waiting++ && fiber.call != call) {
        block.error = "warp divergence: lanes of one warp wait in different functions";
        return false;
      }
      call = fiber.call;
    }
    if (!waiting) return true;
    if (waiting != WARP) {
      block.error = "warp divergence: a warp function without all 32 lanes";
      return false;
    }
    for (unsigned i = 0; i < WARP; i++) block.fibers[first + i].state = State::Ready;
  }
}

inline void run_block() {
  unsigned count = block.fibers.size(), warps = count / WARP;
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = block.fibers[i];
    fiber = Fiber();
    fiber.number = i, fiber.index.x = i;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = block.stacks.data() + i * STACK;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    for (unsigned i = 0; i < warps; i++)
      if (!run_warp(in_order(i, warps) * WARP)) return;
    unsigned at_block = 0;
    for (Fiber& fiber : block.fibers) at_block += fiber.state == State::AtBlock;
    if (!at_block) return;
    if (at_block != count) {
      block.error = "barrier divergence: __syncthreads without all threads of the block";
      return;
    }
    for (Fiber& fiber : block.fibers) fiber.state = State::Ready;
  }
}

// Run a whole grid; returns an error or null.
template <class Args>
const char* launch(void (*kernel)(Args), unsigned grid_x, unsigned grid_y, unsigned threads, size_t shared_bytes,
                   const void* args_bytes) {
  static void (*function)(Args);
  function = kernel;
  Args args;
  std::memcpy(&args, args_bytes, sizeof(Args));
  if (threads == 0 || threads % WARP || threads > 1024) return "a block has 32, 64, ... 1024 threads";
  block.fibers.resize(threads);
  block.stacks.resize(threads * STACK);
  block.size = {threads, 1, 1}, block.grid = {grid_x, grid_y, 1};
  block.kernel = [](const void* p) { function(*static_cast<const Args*>(p)); };
  block.args = &args, block.error = nullptr;
  for (unsigned y = 0; y < grid_y; y++) {
    for (unsigned x = 0; x < grid_x; x++) {
      block.index = {in_order(x, grid_x), in_order(y, grid_y), 0};
      std::unique_ptr<unsigned char, void (*)(void*)> shared(
          static_cast<unsigned char*>(std::malloc(shared_bytes)), std::free);
      std::memset(shared.get(), 0xCB, shared_bytes);
      block.shared = shared.get();
      run_block();
      if (block.error) return block.error;
    }
  }
  return nullptr;
}

}  // namespace host

// ---- what kernels call --------------------------------------------------------------------------------------

#define threadIdx (host::self().index)
#define blockIdx (host::block.index)
#define blockDim (host::block.size)
#define gridDim (host::block.grid)
#define SHARED_MEMORY(name) unsigned char* name = host::block.shared

static inline void __syncthreads() { host::wait(host::State::AtBlock); }
static inline void __syncwarp() { host::meet_warp(host::Call::SyncWarp); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  if (mask != ~0u) std::abort();
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  unsigned box = host::meet_warp(host::Call::Shuffle, bits);
  std::memcpy(&value, &host::lane_of_own_warp(source % host::WARP).mail[box][0], sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, host::self().number % host::WARP ^ distance);
}

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
static inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
// Compiled with -ffp-contract=off, so each of these is rounded on its own.
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fdividef(float x, float y) { return x / y; }
#define __expf(x) std::exp(x)   // the C library has a function of that name
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// What device.cuh writes in PTX.
static inline float half_to_float(unsigned short x) { _Float16 y; std::memcpy(&y, &x, 2); return static_cast<float>(y); }
static inline unsigned short float_to_half(float x) {
  _Float16 y = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}

// mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc: row l / 4 of A is in the lanes 4 (l / 4) .. + 3, a
// word of 32 bits of it in each of a[0] and, 128 bits further on, a[2]; row l / 4 + 8 in a[1] and a[3]. Columns
// of B likewise. A lane gets the results of its two rows and of the columns 2 (l % 4) and the next.
static inline void bmma_instruction(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  unsigned lane = host::self().number % host::WARP;
  unsigned box = host::meet_warp(host::Call::MatrixProduct, a[0] | uint64_t(a[2]) << 32,
                                 a[1] | uint64_t(a[3]) << 32, b[0] | uint64_t(b[1]) << 32);
  for (unsigned word = 0; word < 4; word++) {
    for (unsigned e = 0; e < 4; e++) {
      const uint64_t* row = host::lane_of_own_warp(lane / 4 * 4 + word).mail[box];
      const uint64_t* column = host::lane_of_own_warp((lane % 4 * 2 + e % 2) * 4 + word).mail[box];
      d[e] += __builtin_popcountll(row[e / 2] & column[2]);
    }
  }
}
