// conv2d with its epilogue, and its gradients, by filters that change at every call: the algorithm is the heuristic's,
// and memory for packed filters and scratch is found here. A training step runs hundreds of these between which no
// cache stays warm, so that each is one call from Python.
#pragma once
#include "conv_backward.h"

namespace rf {

// float32 filters w[k, c, r, s] of any strides, in elements, negative ones too; stride_k counts within a group.
struct Filters {
  const float* w;
  int64_t stride_group, stride_k, stride_c, stride_r, stride_s;
};

// y = relu(conv(x) * scale + shift + residual), as ConvArgs.
struct ConvCall {
  ConvShape shape;
  DType dtype;
  void* y;
  const void* x;
  Filters filters;
  const float* scale;    // null: 1
  const float* shift;    // null: 0
  const void* residual;  // null: none
  bool relu;
  bool exact;  // no Winograd, no Strassen
  int threads;
  float* moments = nullptr;  // partial sums of y for the norm behind it, where conv_takes says so
  ConvNorm norm = {};        // a norm and ReLU before it, where conv_takes says so
};
void conv_forward(const ConvCall&);

// What of the norms around it the algorithm of a convolution takes over.
struct ConvTakes {
  bool moments, norm;
};
ConvTakes conv_takes(const ConvShape&, DType, bool exact, int threads);

// dx of the convolution of `shape` (of the forward pass), by its filters.
struct DataGradientCall {
  ConvShape shape;
  DType dtype;
  void* dx;
  const void* dy;
  Filters filters;
  const void* residual;  // like dx, added to it, at stride 1 only; null: none
  bool exact;
  int threads;
};
void conv_data_gradient(const DataGradientCall&);
const char* conv_data_gradient_why_not(const ConvShape&, DType, bool residual);

// dw, and whether what a value of dy or x that is not finite would spoil is finite.
//
// The border is multiplied as zeros, and 0 times a NaN of dy is NaN: torch leaves those taps out; Winograd mixes taps.
// What is not finite in filter k's gradient reaches dw[k] of every channel, in channel c of x dw[:, c] of every filter
// of its group: the first of each is looked at. Of 1x1 filters, which have neither border nor anything mixed, none.
bool conv_weight_gradient(const WgradArgs&, bool exact);

}  // namespace rf
