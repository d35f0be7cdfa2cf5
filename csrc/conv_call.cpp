// conv2d and its gradients in one call each: the heuristic's algorithm, memory for it, filters packed, the kernel.
// Bytes: those of the kernels, and the packed filters written and read (in the caches where run_streamed can).
// The idea: what Python did here (plans, workspaces, packing, six calls) took 22 us more of a warm interpreter a call.
// Tried and lost: packing dense filters one at a time with the scale in them, where the epilogue can multiply.
#include "conv_call.h"

#include <cmath>

#include "check.h"
#include "cpu/kernels.h"
#include "workspace.h"

namespace rf {

namespace {

constexpr size_t kLine = 64;

size_t lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

bool is_dense(const Filters& f, const ConvShape& s) {
  const int64_t channels = s.C / s.groups, taps = s.R * s.S;
  return f.stride_s == 1 && f.stride_r == s.S && f.stride_c == taps && f.stride_k == channels * taps &&
         (s.groups == 1 || f.stride_group == s.K / s.groups * f.stride_k);
}

// [K, C / groups, R, S], as ConvKernels::pack wants them.
void copy_dense(const Filters& f, const ConvShape& s, float* out) {
  const int64_t filters = s.K / s.groups, channels = s.C / s.groups;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t r = 0; r < s.R; ++r)
          for (int64_t t = 0; t < s.S; ++t)
            *out++ = f.w[g * f.stride_group + k * f.stride_k + c * f.stride_c + r * f.stride_r + t * f.stride_s];
}

// Whether the data gradient is itself a convolution of dy: stride 1, and padding that fits.
bool is_convolution(const ConvShape& s) {
  return s.stride_h == 1 && s.stride_w == 1 && s.pad_h <= s.dilation_h * (s.R - 1) &&
         s.pad_w <= s.dilation_w * (s.S - 1);
}

}  // namespace

void conv_forward(const ConvCall& c) {
  const Kernels& k = kernels();
  const ConvShape& s = c.shape;
  const ConvConfig config = k.conv->heuristic(s, c.dtype, c.threads, c.exact);
  // Strided packing knows no scale, which then waits for the epilogue: packing dense filters one at a time takes
  // longer.
  const bool strided = !k.pack_strided_why_not(s, c.dtype, config.algorithm);
  const Filters& f = c.filters;
  ConvArgs args{s,       config,     c.dtype, c.y,     c.x,       nullptr, strided ? c.scale : nullptr,
                c.shift, c.residual, c.relu,  nullptr, c.moments, c.norm};
  PackStridedArgs pack{s,          c.dtype,    config.algorithm, nullptr,   f.w,           f.stride_k,
                       f.stride_c, f.stride_r, f.stride_s,       c.threads, f.stride_group};
  if (strided) {
    if (const size_t bytes = k.streamed_scratch_bytes(s, c.dtype, config.algorithm, c.threads)) {
      const Workspace work(bytes);
      args.scratch = work.at(0);
      return k.run_streamed(args, pack);
    }
  }
  const bool copies = !strided && !is_dense(f, s);
  const size_t packed = lines(k.conv->packed_bytes(s, c.dtype, config.algorithm));
  const size_t scratch = lines(k.conv->scratch_bytes(s, c.dtype, config, c.threads));
  const size_t dense = copies ? size_t(s.K * (s.C / s.groups) * s.R * s.S) * sizeof(float) : 0;
  const Workspace work(packed + scratch + dense);
  if (strided) {
    pack.packed = work.at(0);
    k.pack_strided(pack);
  } else {
    float* copy = reinterpret_cast<float*>(work.at(packed + scratch));
    if (copies) copy_dense(f, s, copy);
    k.conv->pack(s, c.dtype, config.algorithm, work.at(0), copies ? copy : f.w, c.scale, c.threads);
  }
  args.packed = work.at(0);
  args.scratch = work.at(packed);
  k.conv->run_alone(args, c.threads);
}

ConvTakes conv_takes(const ConvShape& s, DType t, bool exact, int threads) {
  const ConvKernels& conv = *kernels().conv;
  const ConvConfig config = conv.heuristic(s, t, threads, exact);
  return {conv.takes_moments(s, config), conv.takes_norm(s, t, config)};
}

// At stride 1 a convolution of dy by the filters with K and C exchanged and their taps reversed.
void conv_data_gradient(const DataGradientCall& c) {
  const Kernels& k = kernels();
  const ConvShape& s = c.shape;
  const Filters& f = c.filters;
  if (is_convolution(s)) {
    ConvShape turned = {s.N, s.P, s.Q, s.K, s.C, s.R, s.S, s.H, s.W};
    turned.pad_h = s.dilation_h * (s.R - 1) - s.pad_h;
    turned.pad_w = s.dilation_w * (s.S - 1) - s.pad_w;
    turned.dilation_h = s.dilation_h;
    turned.dilation_w = s.dilation_w;
    turned.groups = s.groups;
    const float* last_tap = f.w + (s.R - 1) * f.stride_r + (s.S - 1) * f.stride_s;
    const Filters filters{last_tap, f.stride_group, f.stride_c, f.stride_k, -f.stride_r, -f.stride_s};
    return conv_forward(
        {turned, c.dtype, c.dx, c.dy, filters, nullptr, nullptr, c.residual, false, c.exact, c.threads});
  }
  RF_CHECK(!c.residual,
           "conv_data_gradient: a residual is added at stride 1 only and padding within the filter, got stride ",
           s.stride_h, " x ", s.stride_w, ", padding ", s.pad_h, " x ", s.pad_w);
  const bool winograd = !c.exact && !k.dgrad_winograd_why_not(s, c.dtype);
  (winograd ? k.dgrad_winograd
            : k.dgrad)({s, c.dtype, c.dx, c.dy, f.w, f.stride_k, f.stride_c, f.stride_r, f.stride_s, c.threads});
}

const char* conv_data_gradient_why_not(const ConvShape& s, DType t, bool residual) {
  if (is_convolution(s)) return nullptr;
  return residual ? "another gradient is added to that of a convolution of stride 1 only"
                  : kernels().dgrad_why_not(s, t);
}

bool conv_weight_gradient(const WgradArgs& a, bool exact) {
  const Kernels& k = kernels();
  const ConvShape& s = a.shape;
  const bool winograd = !exact && !k.wgrad_winograd_why_not(s, a.dtype);
  const bool stem = !exact && !k.wgrad_stem_why_not(s, a.dtype);
  (winograd ? k.wgrad_winograd : stem ? k.wgrad_stem : k.wgrad)(a);
  if (s.R * s.S == 1) return true;
  float sum = 0;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t t = 0; t < s.S; ++t) {
      const float* tap = a.dw + r * a.stride_r + t * a.stride_s;
      for (int64_t i = 0; i < s.K; ++i) sum += 0 * tap[i * a.stride_k];
      for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t c = 0; c < s.C / s.groups; ++c) sum += 0 * tap[g * (s.K / s.groups) * a.stride_k + c * a.stride_c];
    }
  return std::isfinite(sum);
}

}  // namespace rf
