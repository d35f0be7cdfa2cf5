// Pooling for inference: max, average, global average; NHWC, no indices kept (training's max_pool keeps them).
#pragma once
#include "types.h"

namespace rf {

struct PoolArgs {
  DType dtype = DType::f32;
  void* y = nullptr;        // [N, P, Q, C]
  const void* x = nullptr;  // [N, H, W, C]
  int64_t N = 0, H = 0, W = 0, C = 0;
  int64_t P = 0, Q = 0;
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;   // top and left; what lies beyond the bottom and right follows from P and Q
  bool count_include_pad = true;  // average only
};

}  // namespace rf
