// "direct" on bf16 tensors: pairs of bf16 where the machine multiplies them, widened to float32 elsewhere.
#include "conv_direct.h"

namespace rf {
namespace RF_ISA {

void direct_bf16(const ConvArgs& a, const Team& team) { direct_run<bf16, Bf16Word>(a, team); }

}  // namespace RF_ISA
}  // namespace rf
