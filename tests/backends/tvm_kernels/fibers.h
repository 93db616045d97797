// CUDA C++ as ordinary C++: a thread is a fiber; barriers and shuffles hand over to the next one.
// A fragment of a matrix is held whole by every thread of the warp, so that products need no exchange.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

using half = _Float16;
using uint = unsigned int;
using uchar = unsigned char;
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { uint x, y; };
struct uint4 { uint x, y, z, w; };
struct longlong4 { long long x, y, z, w; };
struct ulonglong4 { unsigned long long x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct char4 { signed char x, y, z, w; };
struct half4 { half x, y, z, w; };
struct uchar4 { uchar x, y, z, w; };
struct dim3 { int x, y, z; };
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__
#define alignas(n) __attribute__((aligned(n)))
#define CUDART_INF_F INFINITY
using std::max;
using std::min;

static dim3 threadIdx, blockIdx;
enum class State { ready, at_block, at_warp, done };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread;
  State state;
  uint64_t slot;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static size_t current;
static std::function<void()> body;

static void wait(State state) {
  size_t self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
}
static void __syncthreads() { wait(State::at_block); }
static void __syncwarp(uint = ~0u) { wait(State::at_warp); }
static uint __activemask() { return ~0u; }

template <class T> T exchange(T value, size_t from) {
  size_t self = current;
  std::memcpy(&fibers[self].slot, &value, sizeof(T));
  wait(State::at_warp);
  T got;
  std::memcpy(&got, &fibers[from].slot, sizeof(T));
  wait(State::at_warp);
  return got;
}
template <class T> T __shfl_down_sync(uint, T value, int offset, int) {
  size_t lane = current % 32;
  return exchange(value, lane + offset < 32 && current + offset < fibers.size() ? current + offset : current);
}
template <class T> T __shfl_sync(uint, T value, int lane, int) { return exchange(value, current / 32 * 32 + lane % 32); }
static int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
  return c;
}
static half __float2half_rn(float x) { return (half)x; }

namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <class T> using wide = std::conditional_t<std::is_same_v<T, half>, float, decltype(T() + T())>;
template <class Use, int M, int N, int K, class T, class Order = row_major> struct fragment { wide<T> at[16][16]; };
template <class F, class T> void fill_fragment(F& f, T value) {
  for (auto& row : f.at) for (auto& x : row) x = value;
}
template <class U, class T, class P>
void load_matrix_sync(fragment<U, 16, 16, 16, T, row_major>& f, const P* from, unsigned pitch) {
  for (int i = 0; i < 16; ++i) for (int j = 0; j < 16; ++j) f.at[i][j] = from[i * pitch + j];
}
template <class U, class T, class P>
void load_matrix_sync(fragment<U, 16, 16, 16, T, col_major>& f, const P* from, unsigned pitch) {
  for (int i = 0; i < 16; ++i) for (int j = 0; j < 16; ++j) f.at[i][j] = from[j * pitch + i];
}
template <class D, class A, class B, class C> void mma_sync(D& d, const A& a, const B& b, const C& c) {
  auto sums = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sums.at[i][j] += a.at[i][k] * b.at[k][j];
  d = sums;
}
template <class P, class F> void store_matrix_sync(P* to, const F& f, unsigned pitch, layout_t) {
  for (int i = 0; i < 16; ++i) for (int j = 0; j < 16; ++j) to[i * pitch + j] = f.at[i][j];
}
}  // namespace nvcuda::wmma

static void start() {
  body();
  fibers[current].state = State::done;
}

static void run_block() {
  for (auto& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.state = State::ready;
    makecontext(&fiber.context, start, 0);
  }
  for (bool alive = true; alive;) {
    for (current = 0; current < fibers.size(); ++current)
      if (fibers[current].state == State::ready) {
        threadIdx = fibers[current].thread;
        swapcontext(&scheduler, &fibers[current].context);
      }
    alive = false;
    bool all_at_block = true;
    for (auto& fiber : fibers) {
      if (fiber.state == State::at_warp) fiber.state = State::ready, all_at_block = false;
      alive |= fiber.state != State::done;
    }
    if (all_at_block)
      for (auto& fiber : fibers)
        if (fiber.state == State::at_block) fiber.state = State::ready;
  }
}

static void launch(const int* blocks, const int* threads, std::function<void()> kernel) {
  body = kernel;
  fibers.resize(threads[0] * threads[1] * threads[2]);
  for (size_t i = 0; i < fibers.size(); ++i) {
    int at = i;
    fibers[i].thread = {at % threads[0], at / threads[0] % threads[1], at / threads[0] / threads[1]};
    fibers[i].stack.resize(1 << 17);
  }
  for (blockIdx.z = 0; blockIdx.z < blocks[2]; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < blocks[1]; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < blocks[0]; ++blockIdx.x) run_block();
}
