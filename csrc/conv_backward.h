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

// dx; w[k, c, r, s] with k among all filters, c within its group.
struct DgradArgs {
  ConvShape shape;
  DType dtype;
  void* dx;
  const void* dy;
  const float* w;
  int64_t stride_k, stride_c, stride_r, stride_s;  // of w, in elements; stride_c = 1 is the fast one
  int threads;
};

// Filters w[k, c, r, s] at w + k * stride_k + ... packed as ConvKernels::pack packs dense ones. The data gradient of a
// stride 1 convolution is a convolution of dy by the filters with K and C exchanged and R and S reversed: strides
// (stride_c, stride_k, -stride_r, -stride_s) from the last tap, padding R - 1 - pad.
struct PackStridedArgs {
  ConvShape shape;  // of the convolution that will run
  DType dtype;      // of its tensors; w is float32
  int algorithm;
  void* packed;  // conv_packed_bytes() of it
  const float* w;
  int64_t stride_k, stride_c, stride_r, stride_s;
  int threads;
  int64_t stride_group = 0;  // stride_k counts within a group
};

// Null: it can; else the reason.
using ConvBackwardWhyNot = const char* (*)(const ConvShape&, DType);

}  // namespace rf
