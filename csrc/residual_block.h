// A residual block of plain convolutions in training, y = relu(bn(conv(... relu(bn(conv(x))))) + shortcut(x)), forward
// and backward in one call each: conv_call.h's convolutions and bn_act.h's norms over memory that is reused.
// Results do not depend on `threads`.
#pragma once
#include <array>
#include <vector>

#include "conv_call.h"

namespace rf {

// A convolution and its norm, with the batch's statistics. Vectors are float32 of K values.
struct BlockLink {
  ConvShape shape;
  Filters filters;
  const float *gamma, *beta;  // or null: 1 and 0
  double eps;
  // The convolution's output: out in forward, in in backward. Null, of the last link and the projection: not kept, and
  // backward computes it again, the same bits.
  void* z;
  float *mean, *var;  // of z, biased: out in forward, in in backward
  // Backward only; null where not wanted.
  float* dw;
  std::array<int64_t, 4> dw_strides;  // k, c, r, s
  float *dgamma, *dbeta;
};

struct ResidualBlock {
  DType dtype;
  const void* x;                      // dense NHWC
  void* y;                            // likewise
  std::vector<BlockLink> links;       // the main path
  std::vector<BlockLink> projection;  // the shortcut: one link without ReLU, or none: x itself
  bool exact;                         // no Winograd, no Strassen
  int threads;
};

void residual_block_forward(const ResidualBlock&);

// dy: like y; dx: like x, or null where not wanted. False where conv_weight_gradient says so of one of the filters: all
// gradients are then to be computed otherwise.
bool residual_block_backward(const ResidualBlock&, const void* dy, void* dx);

// Why the gradients cannot be computed here, null where they can.
const char* residual_block_why_not(const ResidualBlock&);

// Every stride-th pixel of x as a dense tensor, and a dense tensor added to every stride-th pixel of dx: what a 1x1
// filter of that stride reads, and the gradient of that. The shape is the filter's.
struct StridedPixelsArgs {
  ConvShape shape;
  DType dtype;
  void* large;  // [N, H, W, C]
  void* small;  // [N, P, Q, C]
  int threads;
};

}  // namespace rf
