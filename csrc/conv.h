// conv2d and conv_bn_act: y = relu(conv(x, w) * scale + shift + residual).
// x, residual and y are dense NHWC; the weights were packed once for one algorithm by conv_pack().
// conv_run() is SPMD: every thread of a team calls it with the same arguments.
#pragma once
#include "types.h"

namespace rf {

struct ConvShape {
  int64_t N, H, W, C;  // input
  int64_t K, R, S;     // filters; P x Q is the output's size
  int64_t P, Q;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;  // top and left; bottom and right follow from P and Q
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  bool planar = false;  // x is dense NCHW: only "stem" reads that
};

// What an algorithm may be asked to tune; 0 means "the algorithm's own default for this shape".
struct ConvConfig {
  int algorithm = 0;   // index into conv_algorithms()
  int block_rows = 0;  // GEMM rows (pixels or Winograd tiles) a thread keeps in cache
  int block_cols = 0;  // output channels per pass over those rows
  int split_cols = 0;  // 0: threads share rows, 1: threads share output channels
};

// A norm with known statistics and ReLU before a convolution: x is read as relu((x - mean) * scale + beta).
struct ConvNorm {
  const float *mean, *scale, *beta;  // [C]
};

struct ConvArgs {
  ConvShape shape;
  ConvConfig config;
  DType dtype = DType::f32;
  void* y = nullptr;
  const void* x = nullptr;
  const void* packed = nullptr;    // from conv_pack
  const float* scale = nullptr;    // [K]; null: 1
  const float* shift = nullptr;    // [K]; null: 0
  const void* residual = nullptr;  // like y; null: none
  bool relu = false;
  void* scratch = nullptr;  // conv_scratch_bytes() of it, 64-byte aligned
  // Where takes_moments and takes_norm say so, else null:
  float* moments = nullptr;  // partial sums of y for a norm behind it, bn_moments_size(rows, K) floats
  ConvNorm norm = {};        // before it
};

// The doors of the convolution kernels; one set per instruction set, in the Kernels table.
// An algorithm is one way to compute the same thing ("direct", "winograd2", "winograd4", "gemm", ...).
struct ConvKernels {
  int (*algorithms)();  // how many there are
  const char* (*name)(int algorithm);
  int (*tile_rows)(int algorithm);  // 1: a row of outputs does not depend on which rows are computed with it
  const char* (*why_not)(const ConvShape&, DType, int algorithm);             // null: it can; else the reason
  ConvConfig (*heuristic)(const ConvShape&, DType, int threads, bool exact);  // exact: no Winograd, no Strassen
  size_t (*packed_bytes)(const ConvShape&, DType, int algorithm);
  // w: dense [K, C/groups, R, S] float32; fold: [K] multiplied into the filters, or null.
  void (*pack)(const ConvShape&, DType, int algorithm, void* packed, const float* w, const float* fold, int threads);
  size_t (*scratch_bytes)(const ConvShape&, DType, const ConvConfig&, int threads);
  void (*run)(const ConvArgs&, int rank, int size, void* barrier);  // barrier: the team's Barrier*
  bool (*takes_moments)(const ConvShape&, const ConvConfig&);
  bool (*takes_norm)(const ConvShape&, DType, const ConvConfig&);
  // Opens a team of `threads` and runs: for callers that have no team of their own.
  void (*run_alone)(const ConvArgs&, int threads);
  // Writes up to `max` configurations worth timing, the heuristic's first; returns how many.
  int (*candidates)(const ConvShape&, DType, int threads, ConvConfig* out, int max);
};

}  // namespace rf
