// The data gradient of a 3x3 convolution of stride 2 and padding 1 by Winograd's algorithm (LineTransposed4 of
// winograd_lines.h): a tile is 8x8 pixels of dx from 5x5 of dy, 81 products for the 144 of dgrad.cpp, which multiplies
// no tap in vain either. 81/32*N*P*Q*K*C flops where tiles divide the image. The machinery is the forward's: dx is the
// output of a convolution whose input is dy and whose filters have K and C exchanged, packed at every call: 36
// floats for 9, a panel at a time where they outweigh the tiles. float32 only: on bf16's pairs the pixels that four
// taps meet lost 4.6 times eager's accuracy.
#include "../workspace.h"
#include "winograd_streamed.h"

namespace rf {
namespace RF_ISA {

template RF_TRANSFORMS(LineTransposed4, LineTransposed4, float, float);

namespace {

constexpr int64_t kLeastTiles = 28;  // with 32 it is 1.2 times as fast as dgrad.cpp, with 16 as fast

using Line = LineTransposed4;

// dx as the output of a convolution of dy.
ConvShape as_convolution(const ConvShape& of) {
  ConvShape s = of;
  s.H = of.P, s.W = of.Q, s.C = of.K;
  s.P = of.H, s.Q = of.W, s.K = of.C;
  s.pad_h = s.pad_w = 0;
  return s;
}
size_t streamed(const ConvShape& s, int threads) { return Streamed<Line, Line, float>(s).scratch_bytes(threads); }

}  // namespace

const char* dgrad_winograd_why_not(const ConvShape& s, DType t) {
  if (t != DType::f32) return "this Winograd is for float32";
  if (s.R != 3 || s.S != 3) return "Winograd needs a 3x3 filter";
  if (s.stride_h != 2 || s.stride_w != 2) return "this Winograd needs stride 2";
  if (s.pad_h != 1 || s.pad_w != 1) return "this Winograd needs padding 1";
  if (s.dilation_h != 1 || s.dilation_w != 1) return "Winograd needs dilation 1";
  if (s.groups != 1) return "Winograd needs groups 1";
  if (s.K < 16 || s.C < 16) return "fewer than 16 channels do not pay for the transforms";
  if (TileKinds<Line, Line>(s.N, s.H, s.W).tiles < kLeastTiles)
    return "too few pixels for Winograd to pay for packing the filters";
  return nullptr;
}

void dgrad_winograd(const DgradArgs& a) {
  ConvArgs args{};
  const ConvShape& s = args.shape = as_convolution(a.shape);
  args.x = a.dy;
  args.y = a.dx;
  PackStridedArgs filters{s, a.dtype, 0, nullptr, a.w, a.stride_c, a.stride_k, a.stride_r, a.stride_s, a.threads};
  if (const size_t bytes = streamed(s, a.threads)) {
    const Workspace work(bytes);
    args.scratch = work.at(0);
    return run_streamed<Line, Line, float, float>(args, filters, a.threads);
  }
  const WinogradPlan<Line, Line, float> plan(s, args.config);
  const size_t packed = odd_lines(plan.weight_bytes()), working = plan.scratch_bytes(args.config, a.threads);
  const Workspace work(packed + working);
  args.packed = filters.packed = work.at(0);
  args.scratch = work.at(packed);
  parallel(a.threads, [&](const Team& team) {
    pack_winograd<Line, Line, float>(filters, team);
    team.sync();
    WinogradRun<Line, Line, float, float>(args, team).run();
  });
}

}  // namespace RF_ISA
}  // namespace rf
