// Every schema of the compiled operators.
#include <torch/csrc/stable/library.h>

#include <string>

#include "build_facts.h"

STABLE_TORCH_LIBRARY(jackpot, m) {
  m.def("pack_mask(Tensor mask) -> Tensor");
  m.def("unpack_mask(Tensor words, int[] shape) -> Tensor");
  m.def(
      "score_update_(Tensor(a!)[] scores, Tensor(b!)[] momenta, Tensor[] grads, Tensor[] masks, Tensor "
      "hyper, "
      "Tensor(c!) control, Tensor? found_inf, Tensor(d!)? workspace, bool joint) -> ()");
  m.def("threshold(Tensor[] values, Tensor num_kept, bool joint) -> (Tensor, Tensor)");
  m.def(
      "swap_(Tensor[] scores, Tensor(a!)[] masks, Tensor[] weights, Tensor(b!)[] effective, Tensor num_kept, "
      "Tensor schedule, Tensor control, bool joint, str pairs, int seed, Tensor(c!)? workspace) -> Tensor");
  // A search keeps the tensors it was begun with: a step writes to its scores, momenta, masks, effective and
  // stats besides control.
  m.def(
      "search_begin(Tensor[] scores, Tensor[] momenta, Tensor[] masks, Tensor[] weights, Tensor[] effective, "
      "Tensor hyper, Tensor num_kept, Tensor schedule, Tensor control, Tensor stats, bool joint, str pairs, "
      "int seed, Tensor? workspace) -> int");
  m.def("search_step_(Tensor(a!) control, int search, Tensor[] grads, Tensor? found_inf) -> ()");
  m.def("search_end(Tensor control, int search) -> ()");
  m.def("score_grad(Tensor grad, Tensor weight) -> Tensor");
  m.def("workspace_size(Tensor[] scores, bool joint) -> int");
  m.def("cpu_capability() -> str");
  m.def("build_facts() -> str");
}

namespace {
std::string build_facts() { return JACKPOT_BUILD_FACTS; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jackpot, CompositeExplicitAutograd, m) {
  m.impl("build_facts", TORCH_BOX(&build_facts));
}
