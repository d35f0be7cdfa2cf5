// "winograd4", "winograd2" and "winograd4_strided" in float32, and the doors of all four for both dtypes.
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

template RF_TRANSFORMS(Line4, Line4, float, float);
template RF_TRANSFORMS(Line2, Line2, float, float);
template RF_TRANSFORMS(LineStrided4, LineStrided4, float, float);

void winograd2_bf16(const ConvArgs&, const Team&);  // winograd_bf16.cpp
void winograd4x2_bf16(const ConvArgs&, const Team&);
void winograd4_strided_bf16(const ConvArgs&, const Team&);

static const char* why_not_3x3(const ConvShape& s) {
  if (s.planar) return "Winograd reads NHWC only";
  if (s.R != 3 || s.S != 3) return "Winograd needs a 3x3 filter";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd needs dilation 1";
  if (s.groups != 1) return "Winograd needs groups 1";
  if (s.C < 3) return "Winograd needs 3 input channels: on fewer the rounding of its transforms is most of the error";
  return nullptr;
}
static const char* why_not(const ConvShape& s, DType) {
  if (s.stride_h != 1 || s.stride_w != 1) return "this Winograd needs stride 1";
  return why_not_3x3(s);
}
static const char* why_not_strided(const ConvShape& s, DType) {
  if (s.stride_h != 2 || s.stride_w != 2) return "this Winograd needs stride 2";
  return why_not_3x3(s);
}
static const char* why_not4(const ConvShape& s, DType t) {
  return t == DType::f32 ? why_not(s, t)
                         : "F(4x4) loses six times eager's accuracy in bfloat16; F(4x2) and F(2x2) do not";
}
static const char* why_not4x2(const ConvShape& s, DType t) {
  return t == DType::bf16 ? why_not(s, t) : "F(4x2) is for bfloat16: float32 has F(4x4)";
}

// kFloat, kBf16: the dtypes an algorithm has, as its why_not says.
template <class H, class W, bool kFloat, bool kBf16, void (*run_bf16)(const ConvArgs&, const Team&)>
struct Doors {
  template <class Use>
  static auto with_plan(const ConvShape& s, DType t, const ConvConfig& c, const Use& use) {
    if constexpr (!kBf16)
      return use(WinogradPlan<H, W, float>(s, c));
    else if constexpr (!kFloat)
      return use(WinogradPlan<H, W, Bf16Word>(s, c));
    else
      return t == DType::f32 ? use(WinogradPlan<H, W, float>(s, c)) : use(WinogradPlan<H, W, Bf16Word>(s, c));
  }
  static ConvConfig defaults(const ConvShape& s, DType, int threads) {
    ConvConfig c;
    c.split_cols =
        prefer_split_cols(s.N * ceil_div(s.P, int64_t(H::kOut)) * ceil_div(s.Q, int64_t(W::kOut)), s.K, threads);
    return c;
  }
  static size_t packed_bytes(const ConvShape& s, DType t) {
    return with_plan(s, t, {}, [](const auto& plan) { return plan.weight_bytes(); });
  }
  static void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int threads) {
    if constexpr (kFloat) {
      if (t == DType::f32) return winograd_pack<H, W, float>(s, packed, w, fold, threads);
    }
    if constexpr (kBf16) winograd_pack<H, W, Bf16Word>(s, packed, w, fold, threads);
  }
  static size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
    return with_plan(s, t, c, [&](const auto& plan) { return plan.scratch_bytes(c, threads); });
  }
  static void run(const ConvArgs& a, const Team& team) {
    if constexpr (kFloat) {
      if (a.dtype == DType::f32) return WinogradRun<H, W, float, float>(a, team).run();
    }
    if constexpr (kBf16) run_bf16(a, team);
  }
  static constexpr Algorithm algorithm(const char* name, const char* (*can)(const ConvShape&, DType)) {
    return {name, H::kOut, W::kOut, can, defaults, packed_bytes, pack, scratch_bytes, run};
  }
};

const Algorithm kWinograd4 = Doors<Line4, Line4, true, false, nullptr>::algorithm("winograd4", why_not4);
const Algorithm kWinograd2 = Doors<Line2, Line2, true, true, winograd2_bf16>::algorithm("winograd2", why_not);
const Algorithm kWinograd4x2 = Doors<Line4, Line2, false, true, winograd4x2_bf16>::algorithm("winograd4x2", why_not4x2);
const Algorithm kWinograd4Strided = Doors<LineStrided4, LineStrided4, true, true, winograd4_strided_bf16>::algorithm(
    "winograd4_strided", why_not_strided);

}  // namespace RF_ISA
}  // namespace rf
