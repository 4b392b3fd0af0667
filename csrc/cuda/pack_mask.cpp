#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace jackpot {
namespace {

Tensor packed(const Tensor& mask) {
  const Device device(mask);
  const uint8_t* const from = device.require<uint8_t>(mask, ScalarType::Bool, "mask");
  Tensor words = torch::stable::new_empty(mask, {(mask.numel() + 31) / 32}, ScalarType::Int);
  if (mask.numel() == 0) return words;
  check(pack_mask(device.launch(), from, static_cast<uint32_t*>(words.data_ptr()), mask.numel()));
  return words;
}

Tensor unpacked(const Tensor& words, const std::vector<int64_t>& shape) {
  const Device device(words);
  const uint32_t* const from = device.require<uint32_t>(words, ScalarType::Int, "words");
  Tensor mask = torch::stable::new_empty(words, shape, ScalarType::Bool);
  STD_TORCH_CHECK(words.numel() == (mask.numel() + 31) / 32,
                  "words must have one int32 for 32 weights of shape");
  if (mask.numel() == 0) return mask;
  check(unpack_mask(device.launch(), from, static_cast<uint8_t*>(mask.data_ptr()), mask.numel()));
  return mask;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) {
  m.impl("pack_mask", TORCH_BOX(&jackpot::packed));
  m.impl("unpack_mask", TORCH_BOX(&jackpot::unpacked));
}
