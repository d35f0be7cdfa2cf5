// "winograd4" and "winograd2" in float32, and their doors for both dtypes.
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

void winograd2_bf16(const ConvArgs&, const Team&);  // winograd_bf16.cpp

static const char* why_not(const ConvShape& s, DType) {
  if (s.planar) return "Winograd reads NHWC only";
  if (s.R != 3 || s.S != 3) return "Winograd needs a 3x3 filter";
  if (s.stride_h != 1 || s.stride_w != 1) return "Winograd needs stride 1";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd needs dilation 1";
  if (s.groups != 1) return "Winograd needs groups 1";
  if (s.C < 3) return "Winograd needs 3 input channels: on fewer the rounding of its transforms is most of the error";
  return nullptr;
}
static const char* why_not4(const ConvShape& s, DType t) {
  return t == DType::f32 ? why_not(s, t) : "F(4x4) loses six times eager's accuracy in bfloat16; F(2x2) does not";
}

template <int M>
struct Doors {
  static ConvConfig defaults(const ConvShape& s, DType, int threads) {
    ConvConfig c;
    c.split_cols = prefer_split_cols(s.N * ceil_div(s.P, int64_t(M)) * ceil_div(s.Q, int64_t(M)), s.K, threads);
    return c;
  }
  static size_t packed_bytes(const ConvShape& s, DType t) {
    return t == DType::f32 ? WinogradPlan<M, float>(s, {}).weight_bytes() : WinogradPlan<M, Bf16Word>(s, {}).weight_bytes();
  }
  static void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int threads) {
    t == DType::f32 ? winograd_pack<M, float>(s, packed, w, fold, threads) : winograd_pack<M, Bf16Word>(s, packed, w, fold, threads);
  }
  static size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
    return t == DType::f32 ? WinogradPlan<M, float>(s, c).scratch_bytes(c, threads) : WinogradPlan<M, Bf16Word>(s, c).scratch_bytes(c, threads);
  }
  static void run(const ConvArgs& a, const Team& team) {
    if (a.dtype == DType::f32) {
      WinogradRun<M, float, float>(a, team).run();
    } else {
      winograd2_bf16(a, team);
    }
  }
};

const Algorithm kWinograd4 = {"winograd4", why_not4, Doors<4>::defaults, Doors<4>::packed_bytes, Doors<4>::pack, Doors<4>::scratch_bytes, Doors<4>::run};
const Algorithm kWinograd2 = {"winograd2", why_not, Doors<2>::defaults, Doors<2>::packed_bytes, Doors<2>::pack, Doors<2>::scratch_bytes, Doors<2>::run};

}  // namespace RF_ISA
}  // namespace rf
