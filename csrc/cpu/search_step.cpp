#include "../search_step.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(jackpot, CPU, m) { m.impl("search_step_", TORCH_BOX(&jackpot::search_step_)); }
