#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace jackpot {
alignas(16) unsigned char dynamic_shared[48 * 1024];
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

unsigned resident_blocks = 1;
bool backwards = false;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kWarp = 32;

struct Fibre {
  ucontext_t context;
  void* stack;
  void* fake_stack;
  unsigned thread;
  bool finished;
};

// A place where `size` threads meet. Two rounds of values, as the fastest may be one meeting ahead.
struct Crossing {
  unsigned size = 0, arrived = 0, generation = 0;
  Meeting meeting = Meeting::kNone;
  uint64_t values[2][kWarp] = {};
  bool any[2] = {};
};

struct Block {
  unsigned index, running;
  std::vector<Fibre> fibres;
  Crossing whole;
  std::vector<Crossing> warps;
  std::vector<unsigned char> shared;
};

const std::function<void()>* body;
ucontext_t scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
Block* block;
Fibre* fibre;
uint64_t progress;
std::vector<void*> stacks;

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "cuda_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  abort();
}

void* take_stack() {
  if (stacks.empty()) {
    void* const stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    return stack;
  }
  void* const stack = stacks.back();
  stacks.pop_back();
  return stack;
}

void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  fibre->finished = true;
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
  setcontext(&scheduler);
}

void resume(Fibre& next) {
  fibre = &next;
  threadIdx.x = next.thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, next.stack, kStackBytes);
  swapcontext(&scheduler, &next.context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// Lets the thread wait until all have come; returns which of the two rounds of values is theirs.
unsigned meet(Crossing& crossing, Meeting meeting) {
  if (crossing.arrived == 0) crossing.meeting = meeting;
  if (crossing.meeting != meeting) fail("threads meet in different places");
  const unsigned generation = crossing.generation;
  if (++crossing.arrived == crossing.size) {
    crossing.arrived = 0;
    ++crossing.generation;
    ++progress;
    crossing.any[crossing.generation % 2] = false;
  }
  while (crossing.generation == generation) yield();
  return generation % 2;
}

std::unique_ptr<Block> start_block(unsigned index, size_t shared_bytes) {
  auto started = std::make_unique<Block>();
  const unsigned threads = blockDim.x;
  started->index = index;
  started->running = threads;
  started->fibres.resize(threads);
  started->whole.size = threads;
  started->warps.resize(threads / kWarp);
  for (Crossing& warp : started->warps) warp.size = kWarp;
  started->shared.assign(shared_bytes, 0xcd);  // whoever reads what nobody wrote sees odd numbers
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& fibre = started->fibres[i];
    fibre.stack = take_stack();
    fibre.thread = backwards ? threads - 1 - i : i;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }
  return started;
}

// Every thread of the block goes on until it waits or ends.
void turn(Block& present) {
  block = &present;
  blockIdx.x = present.index;
  std::copy(present.shared.begin(), present.shared.end(), jackpot::dynamic_shared);
  for (Fibre& next : present.fibres) {
    if (next.finished) continue;
    resume(next);
    if (!next.finished) continue;
    --present.running;
    ++progress;
    ASAN_UNPOISON_MEMORY_REGION(next.stack, kStackBytes);
    stacks.push_back(next.stack);
  }
  std::copy_n(jackpot::dynamic_shared, present.shared.size(), present.shared.begin());
}

}  // namespace

void yield() {
  Fibre* const own = fibre;
  __sanitizer_start_switch_fiber(&own->fake_stack, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&own->context, &scheduler);
  __sanitizer_finish_switch_fiber(own->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

bool meet_in_block(Meeting meeting, bool value) {
  Crossing& whole = block->whole;
  whole.any[whole.generation % 2] |= value;
  const unsigned round = meet(whole, meeting);
  return whole.any[round];
}

const uint64_t* meet_in_warp(Meeting meeting, uint32_t lanes, uint64_t value) {
  if (lanes != 0xffffffffu) fail("only whole warps may meet");
  Crossing& warp = block->warps[threadIdx.x / kWarp];
  warp.values[warp.generation % 2][threadIdx.x % kWarp] = value;
  const unsigned round = meet(warp, meeting);
  return warp.values[round];
}

void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (config.blockDim.x % kWarp || config.blockDim.x > 1024 || config.gridDim.x == 0) fail("bad launch");
  if (config.dynamicSmemBytes > sizeof jackpot::dynamic_shared) fail("too much shared memory");
  body = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  unsigned char* const end = jackpot::dynamic_shared + config.dynamicSmemBytes;
  const size_t beyond = sizeof jackpot::dynamic_shared - config.dynamicSmemBytes;
  ASAN_POISON_MEMORY_REGION(end, beyond);
  std::vector<std::unique_ptr<Block>> resident;
  unsigned started = 0, idle = 0;
  while (started < gridDim.x || !resident.empty()) {
    while (started < gridDim.x && resident.size() < resident_blocks) {
      resident.push_back(start_block(started++, config.dynamicSmemBytes));
    }
    const uint64_t before = progress;
    for (size_t i = 0; i < resident.size();) {
      turn(*resident[i]);
      if (resident[i]->running == 0) {
        resident.erase(resident.begin() + i);
      } else {
        ++i;
      }
    }
    idle = progress == before ? idle + 1 : 0;
    if (idle > 100) fail("threads wait for ever");
  }
  ASAN_UNPOISON_MEMORY_REGION(end, beyond);
}

}  // namespace cuda_host
