// "winograd2", "winograd4x2" and "winograd4_strided" on bf16 tensors: transforms in float32, the transformed input and
// filters rounded to bf16 where the machine multiplies pairs of it. A layer's rms error, eager's 1: F(2x2) 1.6,
// F(4x2) 2.5 to 3.2.
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

template RF_TRANSFORMS(Line4, Line2, bf16, Bf16Word);
template RF_TRANSFORMS(Line2, Line2, bf16, Bf16Word);
template RF_TRANSFORMS(LineStrided4, LineStrided4, bf16, Bf16Word);

void winograd2_bf16(const ConvArgs& a, const Team& team) { WinogradRun<Line2, Line2, bf16, Bf16Word>(a, team).run(); }
void winograd4x2_bf16(const ConvArgs& a, const Team& team) { WinogradRun<Line4, Line2, bf16, Bf16Word>(a, team).run(); }
void winograd4_strided_bf16(const ConvArgs& a, const Team& team) {
  WinogradRun<LineStrided4, LineStrided4, bf16, Bf16Word>(a, team).run();
}

}  // namespace RF_ISA
}  // namespace rf
