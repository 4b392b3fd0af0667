// Which instruction set runs the tiles.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "tile.h"

namespace jackpot {
namespace {

const TileKernels& choose() {
  const char* wish = std::getenv("JACKPOT_CPU");
  const std::string name = wish ? wish : "";
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (name.empty() || name == "avx512")) return kAvx512Kernels;
  if (avx2 && (name.empty() || name == "avx2")) return kAvx2Kernels;
#endif
  STD_TORCH_CHECK(name.empty() || name == "scalar",
                  "JACKPOT_CPU must be scalar, avx2 or avx512 and supported by this processor, got ", name);
  return kScalarKernels;
}

std::string cpu_capability() { return tile_kernels().capability; }

}  // namespace

const TileKernels& tile_kernels() {
  static const TileKernels& chosen = choose();
  return chosen;
}

}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&jackpot::cpu_capability));
}
