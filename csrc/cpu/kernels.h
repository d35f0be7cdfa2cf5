// The table of CPU kernels, one instance per instruction set; kernels() is the one chosen at load.
// Every cpu/*.cpp (dispatch.cpp apart) is compiled once per instruction set with RF_ISA naming its namespace.
#pragma once
#include "../add_relu.h"
#include "../conv.h"
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
};

// The set in use: the widest the machine has, or the one RESNET_FAST_ISA names.
const Kernels& kernels();
const char* isa_name();

}  // namespace rf
