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

__device__ uint32_t index_of(const Place& place, uint32_t tile, uint32_t group) {
  return (tile - place.first_tile) * kUpdateTile + (group * kThreads + threadIdx.x) * 4;
}

// Whether all threads find all their elements, in memory that is aligned to four.
__device__ bool is_whole(const UpdateLayer& layer, uint32_t tile) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(layer.scores) |
                        reinterpret_cast<uintptr_t>(layer.momenta) | reinterpret_cast<uintptr_t>(layer.grads);
  const uint32_t left = layer.place.numel - (tile - layer.place.first_tile) * kUpdateTile;
  return all % sizeof(float4) == 0 && left >= kUpdateTile;
}

// The thread's elements of a tile, in groups of four; those past the layer's end are 0.
template <bool kWhole>
__device__ void load(float* to, const float* from, const Place& place, uint32_t tile) {
#pragma unroll
  for (uint32_t i = 0; i < kGroups; ++i) {
    const uint32_t index = index_of(place, tile, i);
    if (kWhole) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(from + index));
      to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
    } else {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) to[4 * i + j] = index + j < place.numel ? from[index + j] : 0.0f;
    }
  }
}

template <bool kWhole>
__device__ void store(float* to, const float* from, const Place& place, uint32_t tile) {
#pragma unroll
  for (uint32_t i = 0; i < kGroups; ++i) {
    const uint32_t index = index_of(place, tile, i);
    const float* const four = from + 4 * i;
    if (kWhole) {
      __stcs(reinterpret_cast<float4*>(to + index), make_float4(four[0], four[1], four[2], four[3]));
    } else {
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (index + j < place.numel) to[index + j] = four[j];
      }
    }
  }
}

__device__ void count_step(const UpdateTable& table) {
  const bool skip = __ldcg(&table.header->counters.not_finite) || (table.found_inf && *table.found_inf != 0);
  const int64_t step = table.control[0] + 1;
  if (!skip) {
    for (uint32_t s = threadIdx.x; s < table.num_segments; s += blockDim.x) {
      table.all_segments[s].counts = {};
      table.all_segments[s].emitted_at = step;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  table.header->counters.not_finite = 0;
  table.control[2] = skip;
  table.control[skip ? 1 : 0] += 1;
}

__global__ void __launch_bounds__(kThreads) check_kernel(const __grid_constant__ UpdateTable table) {
  Shared& shared = shared_memory<Shared>();
  Counters& counters = table.header->counters;
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
  if (__any_sync(kAllLanes, bad) && threadIdx.x % kWarp == 0) atomicOr(&counters.not_finite, 1u);
  if (!is_last(&counters.blocks_done, gridDim.x, shared.last)) return;
  if (threadIdx.x == 0) counters.blocks_done = 0;
  if (table.last) count_step(table);
}

struct Hyper {
  float lr, momentum, weight_decay, nesterov, inv_scale;
};

__device__ void step(float* scores, float* momenta, const float* grads, const Hyper& hyper) {
#pragma unroll
  for (uint32_t j = 0; j < kPerThread; ++j) {
    const float g = __fmaf_rn(hyper.weight_decay, scores[j], __fmul_rn(grads[j], hyper.inv_scale));
    const float m = __fmaf_rn(hyper.momentum, momenta[j], g);
    const float direction = hyper.nesterov != 0 ? __fmaf_rn(hyper.momentum, m, g) : m;
    momenta[j] = m;
    scores[j] = __fmaf_rn(-hyper.lr, direction, scores[j]);
  }
}

// Appends this tile's candidates to the segment's lists, in any order. A list that overflows only counts.
class Emission {
 public:
  // Asks for what it needs, to be there by the time the scores are.
  __device__ Emission(const UpdateTable& table, const UpdateLayer& layer, uint32_t number, uint32_t tile,
                      Shared& shared)
      : table_(table),
        place_(layer.place),
        segment_(table.segments ? table.segments + (table.joint ? 0 : number) : nullptr),
        shared_(shared) {
    if (!segment_) return;
    wanted_ = segment_->armed;
    window_ = segment_->window;
#pragma unroll
    for (uint32_t i = 0; i < kGroups; ++i) {
      const uint32_t index = index_of(place_, tile, i);
      if (index < place_.numel) masks_[i] = layer.mask[index / 32] >> index % 32;
    }
  }

  __device__ bool wanted() const { return wanted_; }

  // Notes which of the thread's scores are candidates.
  __device__ void look(const float* scores, uint32_t tile) {
    __syncthreads();
    if (threadIdx.x == 0) shared_ = {};
    __syncthreads();
    uint32_t counts = 0;  // above, pruned above and kept, ten bits each
#pragma unroll
    for (uint32_t j = 0; j < kPerThread; ++j) {
      if (index_of(place_, tile, j / 4) + j % 4 >= place_.numel) continue;
      const float s = scores[j];
      const bool kept = masks_[j / 4] >> j % 4 & 1;
      const bool above = !(s <= window_.high);  // NaN, too, which ranks greatest
      const bool inside = !above && s >= window_.low;
      kept_ |= static_cast<uint32_t>(kept && (inside || !(s > window_.kept_high))) << j;
      pruned_ |= static_cast<uint32_t>(!kept && (inside || !(s < window_.pruned_low))) << j;
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
    Counts& counts = segment_->counts;
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
  Segment* const segment_;
  Shared& shared_;
  bool wanted_ = false;
  Window window_ = {};
  uint32_t masks_[kGroups] = {};  // those of a group in the lowest bits
  uint32_t kept_ = 0, pruned_ = 0, kept_at_ = 0, pruned_at_ = 0;
};

// Everything a tile needs is asked for before the first of it is used. Tiles are taken from the last one on
// and leave nothing in the cache that would drive out the gradients which the check has just read.
template <bool kWhole>
__device__ void update_tile(const UpdateTable& table, uint32_t tile, uint32_t number, bool skip,
                            Shared& shared) {
  const UpdateLayer& layer = table.layers[number];
  const Place& place = layer.place;
  float scores[kPerThread], momenta[kPerThread], grads[kPerThread];
  const float* const row = table.hyper + 5 * number;
  const Hyper hyper = {row[0], row[1], row[2], row[3], row[4]};
  load<kWhole>(scores, layer.scores, place, tile);
  if (layer.grads) {
    load<kWhole>(momenta, layer.momenta, place, tile);
    load<kWhole>(grads, layer.grads, place, tile);
  }
  Emission emission(table, layer, number, tile, shared);
  if (skip) return;
  if (layer.grads) {
    step(scores, momenta, grads, hyper);
    store<kWhole>(layer.momenta, momenta, place, tile);
    store<kWhole>(layer.scores, scores, place, tile);
  }
  if (!emission.wanted()) return;
  emission.look(scores, tile);
  emission.write(scores, tile);
}

__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ UpdateTable table) {
  Shared& shared = shared_memory<Shared>();
  const bool skip = table.control[2];
  for (uint32_t i = blockIdx.x; i < table.tiles; i += gridDim.x) {
    const uint32_t tile = table.tiles - 1 - i;
    const uint32_t number = layer_from<&Place::first_tile>(table.layers, table.count, tile);
    if (is_whole(table.layers[number], tile)) {
      update_tile<true>(table, tile, number, skip, shared);
    } else {
      update_tile<false>(table, tile, number, skip, shared);
    }
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
  const auto check = [&](UpdateTable& part, size_t first) {
    part.last = first + part.count == layers.size();
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
