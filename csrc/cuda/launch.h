// How the kernels are started; nothing here needs torch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tables.h"

namespace jackpot {

// Other blocks, threads, or layers a launch than usual give the same results.
struct Launch {
  cudaStream_t stream;
  uint32_t multiprocessors;
  uint32_t blocks, threads, layers;  // 0: as usual

  // As many blocks as there are items, up to some for each multiprocessor.
  int64_t blocks_for(int64_t items, uint32_t each) const {
    if (blocks) return blocks;
    return std::max<int64_t>(1, std::min(items, int64_t{multiprocessors} * each));
  }
  uint32_t threads_or(uint32_t usual) const { return threads ? threads : usual; }
};

cudaError_t pack_mask(const Launch& launch, const uint8_t* mask, uint32_t* words, int64_t numel);
cudaError_t unpack_mask(const Launch& launch, const uint32_t* words, uint8_t* mask, int64_t numel);

cudaError_t score_grad(const Launch& launch, const Product& product);

// The layers know their `place.numel` and their memory, the tables what the layers share: joint and hyper,
// found_inf, control; joint, pairs, seed, num_kept, schedule, steps, control and stats; joint, num_kept,
// value and index. The rest is filled in here. A joint segment must fit one table.
cudaError_t score_update(const Launch& launch, const std::vector<UpdateLayer>& layers, UpdateTable table,
                         const Workspace& workspace);
cudaError_t swap(const Launch& launch, const std::vector<SwapLayer>& layers, SwapTable table,
                 const Workspace& workspace);
cudaError_t threshold(const Launch& launch, const std::vector<ThresholdLayer>& layers, ThresholdTable table,
                      const Workspace& workspace);

// body(table, first) for parts of the layers, from `first` on, that fit a table.
template <class Table, class Layer, class Body>
cudaError_t for_each_part(const Launch& launch, Table& table, const std::vector<Layer>& layers, uint32_t tile,
                          const Body& body) {
  const size_t most = launch.layers && !table.joint ? launch.layers : kMaxLayers;
  uint64_t first_rank = 0;
  cudaError_t error = cudaSuccess;
  for (size_t first = 0; first < layers.size() && error == cudaSuccess; first += most) {
    table.count = static_cast<uint32_t>(std::min(most, layers.size() - first));
    std::copy_n(layers.begin() + first, table.count, table.layers);
    place_layers(table, tile, first_rank);
    error = body(table, first);
  }
  return error;
}

template <class Kernel, class... Arguments>
cudaError_t start(Kernel* kernel, cudaStream_t stream, int64_t blocks, uint32_t threads, size_t shared,
                  const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace jackpot
