// The doors of the CUDA part: argument structs (they go to the kernels by value) and launchers. No CUDA header is
// needed to include it, and no torch. Tensors are dense NHWC seen as [rows, channels]; pointers are 16-byte aligned.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "../check.h"

namespace rf::cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };
inline int dtype_bytes(DType t) { return t == DType::f32 ? 4 : 2; }

// What a launcher must know of a card.
struct Device {
  int sms;
  int shared_per_block;  // the most a block may opt in to
  int shared_per_sm;
};
struct Target {
  int device = -1;  // CUDA ordinal; -1: whatever is current
  uintptr_t stream = 0;
  DType dtype = DType::f32;
};

// A launch as it would go to the card. With a hook set nothing is sent to a card: the hook gets every launch instead,
// computed for the card it names. The tests execute kernels this way on machines without one.
struct Launch {
  std::string kernel;  // mangled name of Kernel<&kernel>
  unsigned grid, block, shared;
  bool cooperative;
  const void* args;
  size_t args_bytes;
};
void set_hook(std::function<void(const Launch&)> hook, const Device& card);

int device_count();           // 0 where there is no driver or no card
std::string why_no_device();  // the driver's own words, empty when there is a card

struct AddReluArgs {  // y = relu(x + residual)
  void* y;
  const void* x;
  const void* residual;
  int64_t size;
};
void add_relu(const Target&, const AddReluArgs&);

struct AddReluBackwardArgs {  // dx = dy where !(y <= 0), else 0
  void* dx;
  const void* dy;
  const void* y;
  int64_t size;
};
void add_relu_backward(const Target&, const AddReluBackwardArgs&);

enum class Passes : int { automatic = 0, several = 1, single = 2 };

struct BnActArgs {  // y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual)
  void* y;
  const void* x;
  const void* residual;  // null: none
  const float* gamma;    // null: 1
  const float* beta;     // null: 0
  float* mean;           // [channels], written in training
  float* var;            // biased
  float* workspace;      // bn_act_workspace() floats, in training
  int64_t rows;
  int channels;
  float eps;
  bool relu;
};
int64_t bn_act_workspace(const Target&, int64_t rows, int channels);
void bn_act_inference(const Target&, const BnActArgs&);
// automatic: one cooperative kernel where the tensor fits the card's shared memory, else statistics, finish, apply.
void bn_act_training(const Target&, const BnActArgs&, Passes);
void bn_act_statistics(const Target&, const BnActArgs&);  // mean and var only
bool bn_act_fits_single(const Target&, int64_t rows, int channels);
bool bn_act_single_pass(const Target&, const BnActArgs&);  // false: it does not fit, nothing was launched

struct BnActBackwardArgs {
  void* dx;         // null: not wanted
  void* dresidual;  // null: not wanted
  float* dgamma;    // [channels]; both or neither; needed for dx in training
  float* dbeta;
  const void* dy;
  const void* x;
  const void* y;  // the ReLU's mask; null: recomputed from x with the forward's rounding
  const float* gamma;
  const float* beta;
  const float* mean;
  const float* var;
  float* workspace;
  int64_t rows;
  int channels;
  float eps;
  bool training;
  bool relu;
  bool sums_given;  // dgamma and dbeta are given, for dx alone: they are not computed
};
void bn_act_backward(const Target&, const BnActBackwardArgs&);

struct Window {
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};
struct MaxPoolArgs {  // y, argmax: [N, P, Q, C]; with mean: the input is relu(bn(x)), rounded to x's dtype
  void* y;
  uint8_t* argmax;  // place in the window, row by row; null: not wanted; with mean: 255 where y is not above 0
  const void* x;
  const float* gamma;
  const float* beta;
  const float* mean;  // null: plain pooling
  const float* var;
  int64_t images;
  int height, width, channels, out_height, out_width;
  float eps;
  Window window;
};
void max_pool2d(const Target&, const MaxPoolArgs&);

struct MaxPoolBackwardArgs {
  void* dx;
  const void* dy;
  const uint8_t* argmax;
  int64_t images;
  int height, width, channels, out_height, out_width;
  Window window;
};
void max_pool2d_backward(const Target&, const MaxPoolBackwardArgs&);

}  // namespace rf::cuda
