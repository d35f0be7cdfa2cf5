// max_pool: the largest of each window; padding never wins. x and y are dense NHWC of one dtype.
// A NaN in the window wins and the first of equal values is the one whose index is kept, as in torch.
#pragma once
#include "types.h"

namespace rf {

struct PoolShape {
  int64_t N, H, W, C;
  int64_t P, Q;  // output; given, so that ceil_mode is the caller's arithmetic
  int64_t R, S;  // window
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
};

struct MaxPoolArgs {
  PoolShape shape;
  DType dtype;
  void* y;
  uint8_t* argmax;  // r * S + s of the winner, [N, P, Q, C]; null: not wanted. Needs R * S <= 256.
  const void* x;
  int threads;
};

struct MaxPoolBackwardArgs {
  PoolShape shape;
  DType dtype;
  void* dx;
  const void* dy;
  const uint8_t* argmax;
  int threads;
};

}  // namespace rf
