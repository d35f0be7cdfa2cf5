// "winograd2" on bf16 tensors: transforms in float32, the transformed input and filters rounded to bf16 where
// the machine multiplies pairs of it. F(4x4) was tried: six times eager's error.
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

void winograd2_bf16(const ConvArgs& a, const Team& team) { WinogradRun<2, bf16, Bf16Word>(a, team).run(); }

}  // namespace RF_ISA
}  // namespace rf
