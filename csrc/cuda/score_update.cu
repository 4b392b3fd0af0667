// SGD on the scores of every layer in one pass, which also emits the candidates of the swap that follows.
#include "device.cuh"
#include "launch.h"

namespace jackpot {
namespace {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kGroups = 2;  // of four neighbouring weights, for each thread
constexpr uint32_t kPerThread = 4 * kGroups;
static_assert(kThreads * kPerThread == kUpdateTile);

struct Shared {
  uint32_t kept_out, pruned_out, above, pruned_above, kept;
  uint32_t kept_at, pruned_at;
  uint32_t last;
};

__device__ void store4(float* to, const float* from, uint32_t index, uint32_t numel) {
  if (index + 4 <= numel && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
    *reinterpret_cast<float4*>(to + index) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (index + j < numel) to[index + j] = from[j];
    }
  }
}

__device__ uint32_t index_of(const Place& place, uint32_t tile, uint32_t group) {
  return (tile - place.first_tile) * kUpdateTile + (group * kThreads + threadIdx.x) * 4;
}

__device__ void count_step(const UpdateTable& table) {
  const bool skip = __ldcg(&table.header->not_finite) || (table.found_inf && *table.found_inf != 0);
  const int64_t step = table.control[0] + 1;
  if (!skip) {
    for (uint32_t s = threadIdx.x; s < table.num_segments; s += blockDim.x) {
      table.all_segments[s].counts = {};
      table.all_segments[s].emitted_at = table.all_segments[s].armed ? step : 0;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  table.header->not_finite = 0;
  table.control[2] = skip;
  table.control[skip ? 1 : 0] += 1;
}

__global__ void __launch_bounds__(kThreads) check_kernel(const __grid_constant__ UpdateTable table) {
  Shared& shared = shared_memory<Shared>();
  bool bad = false;
  for (uint32_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const UpdateLayer& layer = table.layers[layer_from<&Place::first_tile>(table.layers, table.count, tile)];
    if (!layer.grads) continue;
    float grads[kPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kGroups; ++i) {
      load4(grads + 4 * i, layer.grads, index_of(layer.place, tile, i), layer.place.numel);
    }
#pragma unroll
    for (uint32_t j = 0; j < kPerThread; ++j) bad |= (float_bits(grads[j]) & 0x7f800000u) == 0x7f800000u;
  }
  if (__any_sync(kAllLanes, bad) && threadIdx.x % kWarp == 0) atomicOr(&table.header->not_finite, 1u);
  if (!is_last(&table.header->blocks_done, gridDim.x, shared.last)) return;
  if (threadIdx.x == 0) table.header->blocks_done = 0;
  if (table.last) count_step(table);
}

__device__ void step4(float* scores, float* momenta, const float* grads, const float* hyper) {
  const float lr = hyper[0], momentum = hyper[1], weight_decay = hyper[2], inv_scale = hyper[4];
  const bool nesterov = hyper[3] != 0;
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j) {
    const float g = __fmaf_rn(weight_decay, scores[j], __fmul_rn(grads[j], inv_scale));
    const float m = __fmaf_rn(momentum, momenta[j], g);
    const float direction = nesterov ? __fmaf_rn(momentum, m, g) : m;
    momenta[j] = m;
    scores[j] = __fmaf_rn(-lr, direction, scores[j]);
  }
}

// Appends this tile's candidates to the segment's lists, in any order. A list that overflows only counts.
class Emission {
 public:
  __device__ Emission(const UpdateTable& table, const Place& place, Segment& segment, Shared& shared)
      : table_(table), place_(place), segment_(segment), shared_(shared) {
    __syncthreads();
    if (threadIdx.x == 0) shared_ = {};
    __syncthreads();
  }

  // Notes which of the thread's scores are candidates.
  __device__ void look(const float* scores, const uint32_t* mask, uint32_t tile) {
    const Window window = segment_.window;
    uint32_t counts = 0;  // above, pruned above and kept, ten bits each
#pragma unroll
    for (uint32_t j = 0; j < kPerThread; ++j) {
      const uint32_t index = index_of(place_, tile, j / 4) + j % 4;
      if (index >= place_.numel) continue;
      const float s = scores[j];
      const bool kept = mask[index / 32] >> index % 32 & 1;
      const bool above = !(s <= window.high);  // NaN, too, which ranks greatest
      const bool inside = !above && s >= window.low;
      kept_ |= static_cast<uint32_t>(kept && (inside || !(s > window.kept_high))) << j;
      pruned_ |= static_cast<uint32_t>(!kept && (inside || !(s < window.pruned_low))) << j;
      counts += static_cast<uint32_t>(above) | (above && !kept) << 10 | kept << 20;
    }
    counts = __reduce_add_sync(kAllLanes, counts);
    if (threadIdx.x % kWarp == 0) {
      atomicAdd(&shared_.above, counts & 1023);
      atomicAdd(&shared_.pruned_above, counts >> 10 & 1023);
      atomicAdd(&shared_.kept, counts >> 20);
    }
    const uint32_t kept_here = __popc(kept_), pruned_here = __popc(pruned_);
    if (kept_here) kept_at_ = atomicAdd(&shared_.kept_out, kept_here);
    if (pruned_here) pruned_at_ = atomicAdd(&shared_.pruned_out, pruned_here);
  }

  __device__ void write(const float* scores, uint32_t tile) {
    __syncthreads();
    if (threadIdx.x == 0) add_up();
    __syncthreads();
    const uint32_t capacity = capacity_of();
    uint64_t* const ranks = table_.ranks + place_.lists;
    if (shared_.kept_at + shared_.kept_out <= capacity) {
      append(ranks + shared_.kept_at + kept_at_, kept_, scores, tile);
    }
    if (shared_.pruned_at + shared_.pruned_out <= capacity) {
      append(ranks + capacity + shared_.pruned_at + pruned_at_, pruned_, scores, tile);
    }
  }

 private:
  __device__ uint32_t capacity_of() const {
    const Place& end = table_.joint ? table_.layers[table_.count - 1].place : place_;
    return candidate_capacity(end.position + end.numel);
  }

  __device__ void add_up() {
    Counts& counts = segment_.counts;
    shared_.kept_at = shared_.kept_out ? atomicAdd(&counts.kept_out, shared_.kept_out) : 0;
    shared_.pruned_at = shared_.pruned_out ? atomicAdd(&counts.pruned_out, shared_.pruned_out) : 0;
    atomicAdd(&counts.above, shared_.above);
    atomicAdd(&counts.pruned_above, shared_.pruned_above);
    atomicAdd(&counts.kept, shared_.kept);
  }

  __device__ void append(uint64_t* to, uint32_t chosen, const float* scores, uint32_t tile) const {
#pragma unroll
    for (uint32_t j = 0; j < kPerThread; ++j) {
      if (chosen >> j & 1) {
        *to++ = rank_of(scores[j], place_.position + index_of(place_, tile, j / 4) + j % 4);
      }
    }
  }

  const UpdateTable& table_;
  const Place& place_;
  Segment& segment_;
  Shared& shared_;
  uint32_t kept_ = 0, pruned_ = 0, kept_at_ = 0, pruned_at_ = 0;
};

__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ UpdateTable table) {
  if (table.control[2]) return;
  Shared& shared = shared_memory<Shared>();
  for (uint32_t tile = blockIdx.x; tile < table.tiles; tile += gridDim.x) {
    const uint32_t number = layer_from<&Place::first_tile>(table.layers, table.count, tile);
    const UpdateLayer& layer = table.layers[number];
    Segment* const segment = table.segments ? table.segments + (table.joint ? 0 : number) : nullptr;
    const bool emit = segment && segment->armed;
    if (!layer.grads && !emit) continue;

    float scores[kPerThread], momenta[kPerThread], grads[kPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kGroups; ++i) {
      const uint32_t index = index_of(layer.place, tile, i);
      load4(scores + 4 * i, layer.scores, index, layer.place.numel);
      if (!layer.grads) continue;
      load4(momenta + 4 * i, layer.momenta, index, layer.place.numel);
      load4(grads + 4 * i, layer.grads, index, layer.place.numel);
    }
    if (layer.grads) {
#pragma unroll
      for (uint32_t i = 0; i < kGroups; ++i) {
        const uint32_t index = index_of(layer.place, tile, i);
        step4(scores + 4 * i, momenta + 4 * i, grads + 4 * i, table.hyper + 5 * number);
        store4(layer.momenta, momenta + 4 * i, index, layer.place.numel);
        store4(layer.scores, scores + 4 * i, index, layer.place.numel);
      }
    }
    if (!emit) continue;
    Emission emission(table, layer.place, *segment, shared);
    emission.look(scores, layer.mask, tile);
    emission.write(scores, tile);
  }
}

}  // namespace

cudaError_t score_update(const Launch& launch, const std::vector<UpdateLayer>& layers, UpdateTable table,
                         const Workspace& workspace) {
  const float* const hyper = table.hyper;
  table.header = workspace.header();
  table.ranks = workspace.ranks();
  table.all_segments = workspace.segments();
  table.num_segments = workspace.num_segments();
  const auto check = [&](const UpdateTable& part, size_t) {
    return start(check_kernel, launch.stream, launch.blocks_for(part.tiles, 8), kThreads, sizeof(Shared),
                 part);
  };
  const auto update = [&](UpdateTable& part, size_t first) {
    if (part.tiles == 0) return cudaSuccess;
    part.hyper = hyper + 5 * first;
    part.segments = part.all_segments ? part.all_segments + first : nullptr;
    const int64_t blocks = launch.blocks ? launch.blocks : part.tiles;
    return start(update_kernel, launch.stream, blocks, kThreads, sizeof(Shared), part);
  };
  // No score may change before the last gradient has been seen.
  const cudaError_t error = for_each_part(launch, table, layers, kUpdateTile, check);
  return error == cudaSuccess ? for_each_part(launch, table, layers, kUpdateTile, update) : error;
}

}  // namespace jackpot
