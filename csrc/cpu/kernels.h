// The table of CPU kernels, one instance per instruction set; kernels() is the one chosen at load.
// Every cpu/*.cpp (dispatch.cpp apart) is compiled once per instruction set with RF_ISA naming its namespace.
#pragma once
#include "../add_relu.h"
#include "../bn_act.h"
#include "../bn_act_max_pool2d.h"
#include "../conv.h"
#include "../conv_backward.h"
#include "../residual_block.h"
#include "program.h"

#ifndef RF_ISA
#define RF_ISA baseline
#endif

namespace rf {

struct Kernels {
  void (*add_relu)(const AddReluArgs&);
  void (*add_relu_backward)(const AddReluBackwardArgs&);
  const ConvKernels* conv;
  NetworkRun network_run;
  void (*bn_act_forward)(const BnActArgs&);
  size_t (*bn_moments_size)(int64_t rows, int64_t channels);  // floats
  void (*bn_act_backward)(const BnActBackwardArgs&);
  void (*bn_update_running)(const BnRunningArgs&);
  void (*bn_act_max_pool_forward)(const BnActMaxPoolArgs&);
  void (*bn_act_max_pool_backward)(const BnActMaxPoolBackwardArgs&);
  void (*max_pool_forward)(const MaxPoolArgs&);
  void (*max_pool_backward)(const MaxPoolBackwardArgs&);
  ConvBackwardWhyNot wgrad_why_not;
  void (*wgrad)(const WgradArgs&);
  ConvBackwardWhyNot wgrad_winograd_why_not;
  void (*wgrad_winograd)(const WgradArgs&);
  ConvBackwardWhyNot wgrad_stem_why_not;
  void (*wgrad_stem)(const WgradArgs&);
  ConvBackwardWhyNot dgrad_why_not;
  void (*dgrad)(const DgradArgs&);
  ConvBackwardWhyNot dgrad_winograd_why_not;
  void (*dgrad_winograd)(const DgradArgs&);
  const char* (*pack_strided_why_not)(const ConvShape&, DType, int algorithm);
  void (*pack_strided)(const PackStridedArgs&);
  size_t (*streamed_scratch_bytes)(const ConvShape&, DType, int algorithm, int threads);
  void (*run_streamed)(const ConvArgs&, const PackStridedArgs&);
  void (*gather_strided_pixels)(const StridedPixelsArgs&);
  void (*add_strided_pixels)(const StridedPixelsArgs&);
};

// The set in use: the widest the machine has, or the one RESNET_FAST_ISA names.
const Kernels& kernels();
const char* isa_name();

}  // namespace rf
