// bn_act: y = relu((x - mean) * (gamma * rstd) + beta + residual) and its backward.
// x, residual, y, dy, dx and dresidual are dense [rows, channels] (NHWC, rows = N*H*W) of one dtype; every vector
// is float32 [channels]. Any pointer marked "or null" may be null. Results do not depend on `threads`.
#pragma once
#include "types.h"

namespace rf {

// A norm whose statistics are known.
struct BnVectors {
  const float* mean;  // null: no norm
  const float* var;
  const float* gamma;  // or null: 1
  const float* beta;   // or null: 0
  double eps;
};

struct BnActArgs {
  DType dtype;
  void* y;      // null: statistics only
  float* mean;  // training: out; eval: in
  float* var;   // training: out, biased, or null; eval: in
  float* rstd;  // out, or null
  const void* x;
  const void* residual;  // or null
  const float* gamma;    // or null: 1
  const float* beta;     // or null: 0
  int64_t rows, channels;
  double eps;
  bool training;  // statistics of this batch; else the given mean and var
  bool relu;
  int threads;
  BnVectors residual_norm = {};  // of the residual, before it is added (a block's projection)
  float* moments = nullptr;      // x's partial sums, bn_moments_size() floats, where a convolution took them
};

// With g = dy where the ReLU passed, else 0:
//   dbeta = sum g;  dgamma = sum g * xhat;  dresidual = g
//   dx = gamma * rstd * (g - dbeta / count - xhat * dgamma / count)   (training)
//   dx = gamma * rstd * g                                             (eval)
struct BnActBackwardArgs {
  DType dtype;
  void* dx;         // or null
  float* dgamma;    // or null
  float* dbeta;     // or null
  void* dresidual;  // or null
  const void* dy;
  const void* x;
  const void* y;       // the mask's source; null: no residual was added, the mask is recomputed from x
  const float* gamma;  // or null: 1
  const float* beta;   // or null: 0
  const float* mean;
  const float* var;  // the forward's, biased: rstd is recomputed from it as the forward computed it
  double eps;
  int64_t rows, channels;
  int64_t count;  // rows behind mean and var; more than `rows` when they were reduced over processes
  bool training;
  bool relu;
  bool sums_given;  // dgamma and dbeta are inputs (already reduced over processes): dx and dresidual only
  int threads;
};

// running = (1 - momentum) * running + momentum * value, with the unbiased variance, as torch does.
struct BnRunningArgs {
  float* running_mean;  // or null
  float* running_var;   // or null
  const float* mean;
  const float* var;  // biased
  int64_t count, channels;
  double momentum;
};

}  // namespace rf
