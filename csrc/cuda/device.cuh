// What all kernels share: dynamic shared memory, sums over a block, the layer that a tile is of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../order.h"
#include "tables.h"

namespace jackpot {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Asks the second-level cache for what is read later, if it is.
__device__ inline void prefetch(const void* at) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

template <class Shared>
__device__ Shared& shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return *reinterpret_cast<Shared*>(dynamic_shared);
}

// The last of `count` whose start(i) is not above the given one.
template <class Start>
__device__ uint32_t last_from(uint32_t count, uint32_t at, const Start& start) {
  uint32_t low = 0, high = count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (start(middle) <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The last layer whose first tile (or position) is not above the given one.
template <uint32_t Place::* kStart, class Layer>
__device__ uint32_t layer_from(const Layer* layers, uint32_t count, uint32_t at) {
  return last_from(count, at, [&](uint32_t i) { return layers[i].place.*kStart; });
}

struct SumScratch {
  uint32_t warps[kWarp];
};

// Sum over the threads up to and with this one; all threads must come here.
__device__ inline uint32_t sum_up_to(uint32_t value, SumScratch& scratch) {
  const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  __syncthreads();
  if (lane == kWarp - 1) scratch.warps[warp] = value;
  __syncthreads();
  return value + __reduce_add_sync(kAllLanes, lane < warp ? scratch.warps[lane] : 0);
}

struct MaxScratch {
  uint64_t warps[kWarp];
};

__device__ inline uint64_t largest_of_warp(uint64_t value) {
  const uint32_t high = static_cast<uint32_t>(value >> 32);
  const uint32_t most = __reduce_max_sync(kAllLanes, high);
  const uint32_t low = __reduce_max_sync(kAllLanes, high == most ? static_cast<uint32_t>(value) : 0);
  return uint64_t{most} << 32 | low;
}

// The largest value of all threads of the block, which must all come here.
__device__ inline uint64_t largest_of_block(uint64_t value, MaxScratch& scratch) {
  const uint32_t lane = threadIdx.x % kWarp;
  value = largest_of_warp(value);
  __syncthreads();
  if (lane == 0) scratch.warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  return largest_of_warp(lane < blockDim.x / kWarp ? scratch.warps[lane] : 0);
}

// True in all threads of the block that comes here as the last of `blocks`: it sees all that the others
// wrote.
__device__ inline bool is_last(uint32_t* counter, uint32_t blocks, uint32_t& scratch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    scratch = atomicAdd(counter, 1u) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return scratch;
}

// Past the first-level cache, which does not see what other blocks write during the launch.
template <class T>
__device__ void copy_from_blocks(T& to, const T& from) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  for (uint32_t i = threadIdx.x; i < sizeof(T) / sizeof(uint32_t); i += blockDim.x) {
    reinterpret_cast<uint32_t*>(&to)[i] = __ldcg(reinterpret_cast<const uint32_t*>(&from) + i);
  }
}

__device__ inline void atomic_max(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}

// Four elements from `index` on, those past the end as 0.
__device__ inline void load4(float* to, const float* from, uint32_t index, uint32_t numel) {
  if (index + 4 <= numel && reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
    const float4 four = *reinterpret_cast<const float4*>(from + index);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) to[j] = index + j < numel ? from[index + j] : 0.0f;
  }
}

}  // namespace jackpot
