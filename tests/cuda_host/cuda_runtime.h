// Runs kernels on the host: every CUDA thread is a fibre, switched where threads meet. The kernels' sources
// compile against this header in the place of CUDA's own. It is strict where the device is not: all threads
// of a block must meet at the same barrier, and all lanes of a warp in the same operation.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_host {

enum class Meeting { kNone, kBarrier, kBarrierOr, kAny, kShuffleUp, kSum, kMost };

extern unsigned resident_blocks;  // that run by turns; the next one starts when one ends
extern bool backwards;            // threads of a block run from the last to the first

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void yield();
bool meet_in_block(Meeting meeting, bool value);                                // any value
const uint64_t* meet_in_warp(Meeting meeting, uint32_t lanes, uint64_t value);  // those of all lanes

}  // namespace cuda_host

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  cuda_host::run(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { cuda_host::meet_in_block(cuda_host::Meeting::kBarrier, false); }
inline int __syncthreads_or(int value) {
  return cuda_host::meet_in_block(cuda_host::Meeting::kBarrierOr, value != 0);
}
inline int __any_sync(unsigned lanes, int value) {
  const uint64_t* const all = cuda_host::meet_in_warp(cuda_host::Meeting::kAny, lanes, value != 0);
  for (int i = 0; i < 32; ++i) {
    if (all[i]) return 1;
  }
  return 0;
}
inline unsigned __shfl_up_sync(unsigned lanes, unsigned value, unsigned step) {
  const uint64_t* const all = cuda_host::meet_in_warp(cuda_host::Meeting::kShuffleUp, lanes, value);
  const unsigned lane = threadIdx.x % 32;
  return static_cast<unsigned>(all[lane < step ? lane : lane - step]);
}
inline unsigned __reduce_add_sync(unsigned lanes, unsigned value) {
  const uint64_t* const all = cuda_host::meet_in_warp(cuda_host::Meeting::kSum, lanes, value);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(all[i]);
  return sum;
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
  const uint64_t* const all = cuda_host::meet_in_warp(cuda_host::Meeting::kMost, lanes, value);
  return static_cast<unsigned>(*std::max_element(all, all + 32));
}
inline void __nanosleep(unsigned) { cuda_host::yield(); }
inline void __threadfence() {}

// Fibres switch nowhere else, so that plain operations are atomic.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T atomicAnd(T* at, T value) {
  const T before = *at;
  *at = before & value;
  return before;
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = before > value ? before : value;
  return before;
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clzll(unsigned long long bits) { return bits ? __builtin_clzll(bits) : 64; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
