// bn_act_max_pool2d: y = max_pool(relu((x - mean) * (gamma * rstd) + beta)), the end of a ResNet's stem, and its
// backward. x, dx are dense [N, H, W, C], y, dy [N, P, Q, C], all of one dtype; vectors are float32 [C]. The statistics
// are given (bn_act_forward with y = null finds a batch's). Results do not depend on `threads`.
#pragma once
#include "max_pool.h"

namespace rf {

struct BnActMaxPoolArgs {
  PoolShape shape;
  DType dtype;
  void* y;
  uint8_t* places;  // r * S + s of the winner, 255 where it is not above 0; null: not wanted. Needs R * S < 256.
  const void* x;
  const float* gamma;  // or null: 1
  const float* beta;   // or null: 0
  const float* mean;
  const float* var;
  double eps;
  int threads;
};

// With g the sum of the dy whose winner a pixel is:
//   dbeta = sum g;  dgamma = sum g * xhat
//   dx = gamma * rstd * (g - dbeta / rows - xhat * dgamma / rows)   (training)
//   dx = gamma * rstd * g                                           (eval)
struct BnActMaxPoolBackwardArgs {
  PoolShape shape;
  DType dtype;
  void* dx;       // or null
  float* dgamma;  // or null
  float* dbeta;   // or null
  const void* dy;
  const uint8_t* places;
  const void* x;
  const float* gamma;  // or null: 1
  const float* mean;
  const float* var;  // the forward's, biased
  double eps;
  bool training;
  int threads;
};

}  // namespace rf
