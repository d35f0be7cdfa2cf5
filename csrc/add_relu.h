// add_relu: y = relu(x + residual), NaN kept as torch keeps it. Any layout, as long as all tensors share it.
#pragma once
#include "types.h"

namespace rf {

struct AddReluArgs {
  DType dtype;
  void* y;
  const void* x;
  const void* residual;
  int64_t size;
  int threads;
};

// dx = dy where !(y <= 0), else 0; the same tensor is the gradient of x and of residual.
struct AddReluBackwardArgs {
  DType dtype;
  void* dx;
  const void* dy;
  const void* y;
  int64_t size;
  int threads;
};

}  // namespace rf
