// Masks as bits: 32 weights in an int32 word, least significant bit first, padding bits 0.
#include "device.cuh"
#include "launch.h"

namespace jackpot {
namespace {

constexpr uint32_t kThreads = 256;

__device__ uint32_t bits_of(uint32_t bytes) {  // of four bools, of which any but 0 is true
  bytes = (bytes | ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu)) >> 7 & 0x01010101u;
  return (bytes * 0x01020408u) >> 24 & 15u;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* mask, uint32_t* words, int64_t numel) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const bool aligned = reinterpret_cast<uintptr_t>(mask) % sizeof(uint4) == 0;
  for (int64_t word = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; word * 32 < numel; word += stride) {
    const uint8_t* const from = mask + word * 32;
    const int64_t count = numel - word * 32 < 32 ? numel - word * 32 : 32;
    uint32_t bits = 0;
    if (aligned && count == 32) {
      const uint4 a = reinterpret_cast<const uint4*>(from)[0], b = reinterpret_cast<const uint4*>(from)[1];
      bits = bits_of(a.x) | bits_of(a.y) << 4 | bits_of(a.z) << 8 | bits_of(a.w) << 12 | bits_of(b.x) << 16 |
             bits_of(b.y) << 20 | bits_of(b.z) << 24 | bits_of(b.w) << 28;
    } else {
      for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(from[i] != 0) << i;
    }
    words[word] = bits;
  }
}

// A thread writes four bytes, so that a warp writes 128 in a row.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint32_t* words, uint8_t* mask, int64_t numel) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t four = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; four * 4 < numel; four += stride) {
    const uint32_t bits = words[four / 8] >> (four % 8 * 4) & 15u;
    if (four * 4 + 4 <= numel) {
      reinterpret_cast<uint32_t*>(mask)[four] = bits * 0x00204081u & 0x01010101u;
    } else {
      for (int64_t i = four * 4; i < numel; ++i) mask[i] = bits >> (i % 4) & 1u;
    }
  }
}

int64_t blocks_for(const Launch& launch, int64_t items) {
  return launch.blocks_for((items + kThreads - 1) / kThreads, 8);
}

}  // namespace

cudaError_t pack_mask(const Launch& launch, const uint8_t* mask, uint32_t* words, int64_t numel) {
  const int64_t blocks = blocks_for(launch, (numel + 31) / 32);
  return start(pack_kernel, launch.stream, blocks, kThreads, 0, mask, words, numel);
}

cudaError_t unpack_mask(const Launch& launch, const uint32_t* words, uint8_t* mask, int64_t numel) {
  const int64_t blocks = blocks_for(launch, (numel + 3) / 4);
  return start(unpack_kernel, launch.stream, blocks, kThreads, 0, words, mask, numel);
}

}  // namespace jackpot
