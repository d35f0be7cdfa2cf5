// The gradients of conv2d. x and dy are dense NHWC, the weight gradient is float32 with any strides.
// Results do not depend on `threads`: the reduction over pixels is never split, only the outputs are.
#pragma once
#include "conv.h"

namespace rf {

// dw[k, c, r, s] = sum over pixels of dy[n, p, q, k] * x[n, p * stride - pad + r * dilation, ..., c].
struct WgradArgs {
  ConvShape shape;
  DType dtype;
  float* dw;
  int64_t stride_k, stride_c, stride_r, stride_s;  // of dw, in elements; stride_c = 1 is the fast one
  const void* dy;
  const void* x;
  int threads;
};

// dx of a convolution with groups = 1.
struct DgradArgs {
  ConvShape shape;
  DType dtype;
  void* dx;
  const void* dy;
  const float* w;
  int64_t stride_k, stride_c, stride_r, stride_s;  // of w, in elements; stride_c = 1 is the fast one
  int threads;
};

// Null: it can; else the reason.
using ConvBackwardWhyNot = const char* (*)(const ConvShape&, DType);

}  // namespace rf
