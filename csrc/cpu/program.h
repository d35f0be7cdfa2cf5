// A planned network as plain data: what the planner (compiled once) hands to the executor (one per instruction set).
#pragma once
#include "../conv.h"
#include "../pool.h"

namespace rf {

// Which memory an operand lies in; known only when a call brings its pointers and its arena.
enum class Space : int { none, arena, input, output, count };

struct Place {
  Space space = Space::none;
  int64_t offset = 0;  // bytes; elements in a layout step's x, whose dtype only the call knows
};

enum class StepKind : int {
  layout,
  conv,
  conv_max_pool,
  max_pool,
  avg_pool,
  global_avg_pool,
  scale,
  add,
  relu,
  sigmoid
};

// One operator over a range of images. Pointers inside conv and pool are left null: the places say where.
struct Step {
  StepKind kind = StepKind::conv;
  int node = -1;     // the value it computes
  bool sync = true;  // a barrier after it: a later step reads what it wrote, or reuses its memory
  bool relu = false;
  DType dtype = DType::f32;
  int64_t images = 0, pixels = 0, channels = 0;  // of y, for the element-wise kinds
  Place y, x, gate, residual, scratch;
  ConvArgs conv;
  PoolArgs pool;
  // conv_max_pool: bytes of one thread's convolution rows, its scratch, and how many pooled rows it makes at a time.
  int64_t row_bytes = 0, scratch_bytes = 0, band = 0;
};

using ConvRun = void (*)(const ConvArgs&, int rank, int size, void* barrier);

struct Program {
  const Step* steps = nullptr;
  int count = 0;
  int threads = 1;
  bool nchw = false;  // the caller's x; layout steps read it
  DType x_dtype = DType::f32;
  ConvRun conv_run = nullptr;  // ConvKernels::run of the same instruction set
};

// bases[space]: where each space begins in this call. ms: milliseconds per step are added to it; null: no clock is
// read.
using NetworkRun = void (*)(const Program&, void* const* bases, double* ms);

}  // namespace rf
