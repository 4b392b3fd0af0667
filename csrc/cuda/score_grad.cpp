#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "tensors.h"

namespace jackpot {
namespace {

Dtype narrow_dtype_of(const Tensor& tensor, const char* name) {
  const Dtype dtype = dtype_of(tensor, name);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64, name, " must be float32, bfloat16 or float16, got float64");
  return dtype;
}

Tensor gradient(const Tensor& grad, const Tensor& weight) {
  const Device device(grad);
  device.require_here(weight, "weight");
  const std::vector<Dim> dims = merged_dims(weight, grad, "grad");
  std::vector<int64_t> shape(grad.dim());
  for (int64_t i = 0; i < grad.dim(); ++i) shape[i] = grad.size(i);
  Tensor out = torch::stable::new_empty(grad, shape, ScalarType::Float);
  STD_TORCH_CHECK(out.numel() < 1ll << 32, "weight must have fewer than 2^32 elements, got ", out.numel());
  if (out.numel() == 0) return out;

  Product product = {grad.data_ptr(), weight.data_ptr(), static_cast<float*>(out.data_ptr()),
                     narrow_dtype_of(grad, "grad"), narrow_dtype_of(weight, "weight")};
  std::fill_n(product.sizes, 3, 1u);
  const size_t inner = std::min<size_t>(dims.size(), 3), outer = dims.size() - inner;
  for (size_t i = 0; i < inner; ++i) {
    const Dim& dim = dims[dims.size() - 1 - i];
    product.sizes[i] = dim.size;
    product.grad_strides[i] = dim.effective_stride;
    product.weight_strides[i] = dim.weight_stride;
  }
  // More than three dimensions, which no memory format leaves, are launches of their own.
  const int64_t each = int64_t{product.sizes[0]} * product.sizes[1] * product.sizes[2];
  for (int64_t slice = 0; slice * each < out.numel(); ++slice) {
    Product part = product;
    int64_t grad_at = 0, weight_at = 0, rest = slice;
    for (size_t i = outer; i-- > 0; rest /= dims[i].size) {
      grad_at += rest % dims[i].size * dims[i].effective_stride;
      weight_at += rest % dims[i].size * dims[i].weight_stride;
    }
    part.grad = static_cast<const char*>(product.grad) + grad_at * grad.element_size();
    part.weight = static_cast<const char*>(product.weight) + weight_at * weight.element_size();
    part.out += slice * each;
    check(score_grad(device.launch(), part));
  }
  return out;
}

}  // namespace
}  // namespace jackpot

STABLE_TORCH_LIBRARY_IMPL(jackpot, CUDA, m) { m.impl("score_grad", TORCH_BOX(&jackpot::gradient)); }
