// The scores' gradient from that of the effective weight: their product with the weight, in float32 and in
// logical order, whatever the order of the two.
#include "convert.cuh"
#include "device.cuh"
#include "launch.h"

namespace jackpot {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kBatch = 4;  // loads of four elements on their way at a time

struct Shared {
  float tile[8192];
};

__device__ float load(const void* from, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[at];
  const uint32_t half = static_cast<const uint16_t*>(from)[at];
  return dtype == Dtype::kBFloat16 ? bits_float(half << 16) : float_of_float16(static_cast<uint16_t>(half));
}

// Four elements in a row, where all are there and memory is aligned to four of them.
__device__ void load_row(float* to, const void* from, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(from) + at));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    return;
  }
  const uint2 four = __ldcs(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at));
  const uint32_t halves[4] = {four.x & 0xffffu, four.x >> 16, four.y & 0xffffu, four.y >> 16};
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    to[j] = dtype == Dtype::kBFloat16 ? bits_float(halves[j] << 16)
                                      : float_of_float16(static_cast<uint16_t>(halves[j]));
  }
}

// Both in logical order: a thread multiplies some groups of four that lie a block apart.
__global__ void __launch_bounds__(kThreads)
    score_grad_rows_kernel(const __grid_constant__ Product p, bool aligned) {
  const int64_t numel = p.sizes[0], step = int64_t{kThreads} * 4;
  for (int64_t tile = blockIdx.x; tile * kBatch * step < numel; tile += gridDim.x) {
    const int64_t first = tile * kBatch * step + threadIdx.x * 4;
    if (aligned && (tile + 1) * kBatch * step <= numel) {
      float grads[kBatch][4], weights[kBatch][4];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        load_row(grads[i], p.grad, p.grad_dtype, first + i * step);
        load_row(weights[i], p.weight, p.weight_dtype, first + i * step);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        const float *const g = grads[i], *const w = weights[i];
        reinterpret_cast<float4*>(p.out + first + i * step)[0] =
            make_float4(g[0] * w[0], g[1] * w[1], g[2] * w[2], g[3] * w[3]);
      }
      continue;
    }
    for (uint32_t i = 0; i < kBatch; ++i) {
      for (int64_t at = first + i * step; at < first + i * step + 4 && at < numel; ++at) {
        p.out[at] = load(p.grad, p.grad_dtype, at) * load(p.weight, p.weight_dtype, at);
      }
    }
  }
}

// In any order: a block reads a tile along the middle dimension, which lies in a row where the memory format
// is channels_last, and writes it along the innermost one.
__global__ void __launch_bounds__(kThreads)
    score_grad_tiles_kernel(const __grid_constant__ Product p, uint32_t columns, uint32_t rows_log2) {
  Shared& shared = shared_memory<Shared>();
  const uint32_t rows = 1u << rows_log2;
  const uint32_t across = (p.sizes[0] + columns - 1) / columns, down = (p.sizes[1] + rows - 1) / rows;
  const int64_t tiles = int64_t{across} * down * p.sizes[2];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t slice = tile / (across * down);
    const uint32_t at = static_cast<uint32_t>(tile % (across * down));
    const uint32_t first_row = at / across * rows, first_column = at % across * columns;
    const uint32_t num_rows = p.sizes[1] - first_row < rows ? p.sizes[1] - first_row : rows;
    const uint32_t num_columns = p.sizes[0] - first_column < columns ? p.sizes[0] - first_column : columns;
    const int64_t grad =
        slice * p.grad_strides[2] + first_row * p.grad_strides[1] + first_column * p.grad_strides[0];
    const int64_t weight =
        slice * p.weight_strides[2] + first_row * p.weight_strides[1] + first_column * p.weight_strides[0];
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < num_columns << rows_log2; i += kThreads) {
      const uint32_t row = i & (rows - 1), column = i >> rows_log2;
      if (row >= num_rows) continue;
      const int64_t in_grad = row * p.grad_strides[1] + column * p.grad_strides[0];
      const int64_t in_weight = row * p.weight_strides[1] + column * p.weight_strides[0];
      shared.tile[row * num_columns + column] =
          load(p.grad, p.grad_dtype, grad + in_grad) * load(p.weight, p.weight_dtype, weight + in_weight);
    }
    __syncthreads();
    float* const out = p.out + (slice * p.sizes[1] + first_row) * p.sizes[0] + first_column;
    for (uint32_t i = threadIdx.x; i < num_rows * num_columns; i += kThreads) {
      const uint32_t skipped = across == 1 ? 0 : i / num_columns * (p.sizes[0] - num_columns);
      out[i + int64_t{skipped}] = shared.tile[i];
    }
    __syncthreads();
  }
}

bool is_aligned(const void* memory, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(memory) % (dtype == Dtype::kFloat32 ? 16 : 8) == 0;
}

}  // namespace

cudaError_t score_grad(const Launch& launch, const Product& p) {
  const bool in_order =
      p.sizes[1] == 1 && p.sizes[2] == 1 && p.grad_strides[0] == 1 && p.weight_strides[0] == 1;
  if (in_order) {
    const bool aligned = is_aligned(p.grad, p.grad_dtype) && is_aligned(p.weight, p.weight_dtype);
    const int64_t each = int64_t{kThreads} * 4 * kBatch;
    const int64_t blocks = launch.blocks_for((p.sizes[0] + each - 1) / each, 16);
    return start(score_grad_rows_kernel, launch.stream, blocks, kThreads, 0, p, aligned);
  }
  // Windows of convolutions are columns, some of their channels rows: up to 64 by 128.
  const uint32_t columns = std::min(p.sizes[0], 64u);
  uint32_t rows_log2 = 0;
  while (rows_log2 < 7 && 1u << rows_log2 < p.sizes[1]) ++rows_log2;
  const int64_t tiles = int64_t{(p.sizes[0] + columns - 1) / columns} *
                        ((p.sizes[1] + (1u << rows_log2) - 1) >> rows_log2) * p.sizes[2];
  const size_t bytes = sizeof(float) * (columns << rows_log2);
  return start(score_grad_tiles_kernel, launch.stream, launch.blocks_for(tiles, 16), kThreads, bytes, p,
               columns, rows_log2);
}

}  // namespace jackpot
