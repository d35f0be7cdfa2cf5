// This instruction set's instance of the kernel table.
#include "kernels.h"

namespace rf {
namespace RF_ISA {

void add_relu(const AddReluArgs&);
void add_relu_backward(const AddReluBackwardArgs&);
extern const ConvKernels kConvKernels;
void network_run(const Program&, void* const* bases, double* ms);
void bn_act_forward(const BnActArgs&);
size_t bn_moments_size(int64_t rows, int64_t channels);
void bn_act_backward(const BnActBackwardArgs&);
void bn_update_running(const BnRunningArgs&);
void bn_act_max_pool_forward(const BnActMaxPoolArgs&);
void bn_act_max_pool_backward(const BnActMaxPoolBackwardArgs&);
void max_pool_forward(const MaxPoolArgs&);
void max_pool_backward(const MaxPoolBackwardArgs&);
const char* wgrad_why_not(const ConvShape&, DType);
void wgrad(const WgradArgs&);
const char* wgrad_winograd_why_not(const ConvShape&, DType);
void wgrad_winograd(const WgradArgs&);
const char* wgrad_stem_why_not(const ConvShape&, DType);
void wgrad_stem(const WgradArgs&);
const char* dgrad_why_not(const ConvShape&, DType);
void dgrad(const DgradArgs&);
const char* dgrad_winograd_why_not(const ConvShape&, DType);
void dgrad_winograd(const DgradArgs&);
const char* pack_strided_why_not(const ConvShape&, DType, int algorithm);
void pack_strided(const PackStridedArgs&);
size_t streamed_scratch_bytes(const ConvShape&, DType, int algorithm, int threads);
void run_streamed(const ConvArgs&, const PackStridedArgs&);
void gather_strided_pixels(const StridedPixelsArgs&);
void add_strided_pixels(const StridedPixelsArgs&);

extern const Kernels kKernels;
const Kernels kKernels = {
    /*add_relu=*/add_relu,
    /*add_relu_backward=*/add_relu_backward,
    /*conv=*/&kConvKernels,
    /*network_run=*/network_run,
    /*bn_act_forward=*/bn_act_forward,
    /*bn_moments_size=*/bn_moments_size,
    /*bn_act_backward=*/bn_act_backward,
    /*bn_update_running=*/bn_update_running,
    /*bn_act_max_pool_forward=*/bn_act_max_pool_forward,
    /*bn_act_max_pool_backward=*/bn_act_max_pool_backward,
    /*max_pool_forward=*/max_pool_forward,
    /*max_pool_backward=*/max_pool_backward,
    /*wgrad_why_not=*/wgrad_why_not,
    /*wgrad=*/wgrad,
    /*wgrad_winograd_why_not=*/wgrad_winograd_why_not,
    /*wgrad_winograd=*/wgrad_winograd,
    /*wgrad_stem_why_not=*/wgrad_stem_why_not,
    /*wgrad_stem=*/wgrad_stem,
    /*dgrad_why_not=*/dgrad_why_not,
    /*dgrad=*/dgrad,
    /*dgrad_winograd_why_not=*/dgrad_winograd_why_not,
    /*dgrad_winograd=*/dgrad_winograd,
    /*pack_strided_why_not=*/pack_strided_why_not,
    /*pack_strided=*/pack_strided,
    /*streamed_scratch_bytes=*/streamed_scratch_bytes,
    /*run_streamed=*/run_streamed,
    /*gather_strided_pixels=*/gather_strided_pixels,
    /*add_strided_pixels=*/add_strided_pixels,
};

}  // namespace RF_ISA
}  // namespace rf
