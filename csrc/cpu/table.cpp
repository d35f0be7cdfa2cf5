// This instruction set's instance of the kernel table.
#include "kernels.h"

namespace rf {
namespace RF_ISA {

void add_relu(const AddReluArgs&);
void add_relu_backward(const AddReluBackwardArgs&);
extern const ConvKernels kConvKernels;
void network_run(const Program&, void* const* bases, double* ms);

extern const Kernels kKernels;
const Kernels kKernels = {
    /*add_relu=*/add_relu,
    /*add_relu_backward=*/add_relu_backward,
    /*conv=*/&kConvKernels,
    /*network_run=*/network_run,
};

}  // namespace RF_ISA
}  // namespace rf
