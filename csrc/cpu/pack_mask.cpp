// Masks as bits: 32 weights in an int32 word, least significant bit first, padding bits 0.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "segments.h"

namespace jackpot {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWordsPerItem = 4096;

// body(first word, words, elements of the last word that are there) for runs of words.
template <class Body>
void each_run(int64_t numel, const Body& body) {
  const int64_t words = (numel + 31) / 32;
  parallel_runs((words + kWordsPerItem - 1) / kWordsPerItem, [&](int64_t item) {
    const int64_t first = item * kWordsPerItem, end = std::min(words, first + kWordsPerItem);
    body(first, end - first, std::min<int64_t>(32, numel - 32 * (end - 1)));
  });
}

Tensor pack_mask(const Tensor& mask) {
  require_cpu(mask, ScalarType::Bool, "mask");
  Tensor words = empty({(mask.numel() + 31) / 32}, ScalarType::Int);
  const uint8_t* const bools = static_cast<const uint8_t*>(mask.data_ptr());
  uint32_t* const out = static_cast<uint32_t*>(words.data_ptr());
  each_run(mask.numel(), [&](int64_t first, int64_t count, int64_t last) {
    const int64_t whole = count - (last < 32);
    tile_kernels().pack(bools + 32 * first, whole, out + first);
    if (whole == count) return;
    uint8_t padded[32] = {};
    memcpy(padded, bools + 32 * (first + whole), last);
    tile_kernels().pack(padded, 1, out + first + whole);
  });
  return words;
}

Tensor unpack_mask(const Tensor& words, const std::vector<int64_t>& shape) {
  require_cpu(words, ScalarType::Int, "words");
  Tensor mask = empty(shape, ScalarType::Bool);
  STD_TORCH_CHECK(words.numel() == (mask.numel() + 31) / 32,
                  "words must have one int32 for 32 weights of shape");
  const uint32_t* const in = static_cast<const uint32_t*>(words.data_ptr());
  uint8_t* const bools = static_cast<uint8_t*>(mask.data_ptr());
  each_run(mask.numel(), [&](int64_t first, int64_t count, int64_t last) {
    const int64_t whole = count - (last < 32);
    tile_kernels().unpack(in + first, whole, bools + 32 * first);
    if (whole == count) return;
    uint8_t padded[32];
    tile_kernels().unpack(in + first + whole, 1, padded);
    memcpy(bools + 32 * (first + whole), padded, last);
  });
  return mask;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) {
  m.impl("pack_mask", TORCH_BOX(&jackpot::pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&jackpot::unpack_mask));
}
