// Packs filters of any strides for "direct", "winograd2" and "winograd4" in float32: what a training step does to weights that
// change every step, forward, and (K and C exchanged, R and S strides negative) for the data gradient.
// Bytes: the filters once, the packed ones once: 1 float for 1 (direct), 36 or 16 for 9 (Winograd).
// The idea: kPanel output channels are a vector and 16 input channels a block, so that reading, G g G^T and writing
// all run over vectors; conv_pack's one filter at a time takes 15 ms for 512 x 512 x 3 x 3, more than the convolution.
// The transform stays in double and in conv_pack's order: the same bits.
#include "../conv_backward.h"
#include "conv_direct.h"
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

extern const ConvKernels kConvKernels;  // conv.cpp

namespace {

constexpr int kDepth = 16;                 // input channels of a block: a line of channels_last filters
constexpr size_t kStreamBytes = 8u << 20;  // packed filters this large will not wait in the caches anyway

// Filters [panel * kPanel, + cols) by channels [c0, + depth) of tap (r, s) as [channel][kPanel], zeros beyond cols.
struct Source {
  const PackStridedArgs& a;
  void read(int64_t panel, int64_t c0, int depth, int64_t r, int64_t s, float* out) const {
    const int64_t k0 = panel * kPanel;
    const int cols = int(smaller(int64_t(kPanel), a.shape.K - k0));
    const float* w = a.w + k0 * a.stride_k + c0 * a.stride_c + r * a.stride_r + s * a.stride_s;
    if (cols < kPanel) std::memset(out, 0, size_t(depth) * kPanel * sizeof(float));
    if (a.stride_k == 1 && cols == kPanel) {
      for (int c = 0; c < depth; ++c) {
        store(out + c * kPanel, load(w + c * a.stride_c));
        store(out + c * kPanel + kLanes, load(w + c * a.stride_c + kLanes));
      }
      return;
    }
    for (int k = 0; k < cols; ++k)
      for (int c = 0; c < depth; ++c) out[c * kPanel + k] = w[k * a.stride_k + c * a.stride_c];
  }
};

void pack_direct(const PackStridedArgs& a, const Team& team) {
  const ConvShape& s = a.shape;
  const DirectPlan p = direct_plan<float>(s);
  const Range panels = team.share(p.panels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    float* out = static_cast<float*>(a.packed) + panel * p.words * kPanel;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t t = 0; t < s.S; ++t)
        for (int64_t c = 0; c < s.C; c += kDepth) {
          const int depth = int(smaller(int64_t(kDepth), s.C - c));
          Source{a}.read(panel, c, depth, r, t, out + ((r * s.S + t) * s.C + c) * kPanel);
        }
    std::memset(out + p.depth * kPanel, 0, size_t((p.words - p.depth) * kPanel) * sizeof(float));
  }
}

template <int M>
void pack_winograd(const PackStridedArgs& a, const Team& team) {
  constexpr int kT = M + 2;
  const ConvShape& s = a.shape;
  const WinogradPlan<M, float> p(s, {});
  double g[kT][3];
  winograd_filter_matrix<M>(g);
  alignas(64) float taps[9][kDepth * kPanel];
  alignas(64) double half[kT][3][kPanel];
  // The points lie a power of two apart and would evict each other from one L1 set.
  const bool streamed = p.weight_bytes() >= kStreamBytes && reinterpret_cast<uintptr_t>(a.packed) % 64 == 0;
  const Range panels = team.share(p.panels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t c0 = 0; c0 < p.words; c0 += kDepth) {
      const int depth = int(smaller(larger(s.C - c0, int64_t(0)), int64_t(kDepth)));
      for (int t = 0; t < 9; ++t) Source{a}.read(panel, c0, depth, t / 3, t % 3, taps[t]);
      for (int c = 0; c < smaller(int64_t(kDepth), p.words - c0); ++c) {
        float* out = static_cast<float*>(a.packed) + (panel * p.words + c0 + c) * kPanel;
        const int64_t point = p.panels * p.words * kPanel;
        if (c >= depth) {
          for (int i = 0; i < kT * kT; ++i) std::memset(out + i * point, 0, kPanel * sizeof(float));
          continue;
        }
        for (int i = 0; i < kT; ++i)
          for (int x = 0; x < 3; ++x) {
            const float *f0 = taps[x] + c * kPanel, *f1 = taps[3 + x] + c * kPanel, *f2 = taps[6 + x] + c * kPanel;
            for (int j = 0; j < kPanel; ++j) half[i][x][j] = g[i][0] * f0[j] + g[i][1] * f1[j] + g[i][2] * f2[j];
          }
        for (int i = 0; i < kT; ++i)
          for (int l = 0; l < kT; ++l) {
            float* to = out + (i * kT + l) * point;
            alignas(64) float line[kPanel];
            for (int j = 0; j < kPanel; ++j) line[j] = float(half[i][0][j] * g[l][0] + half[i][1][j] * g[l][1] + half[i][2][j] * g[l][2]);
            for (int j = 0; j < kPanel; j += kLanes) streamed ? stream(to + j, load(line + j)) : store(to + j, load(line + j));
          }
      }
    }
  }
  if (streamed) stream_fence();
}

}  // namespace

const char* pack_strided_why_not(const ConvShape& s, DType t, int algorithm) {
  if (t != DType::f32) return "filters of any strides are packed in float32 only";
  if (s.groups != 1) return "filters of any strides are packed for groups = 1 only";
  if (const char* why = kConvKernels.why_not(s, t, algorithm)) return why;
  const char* name = kConvKernels.name(algorithm);
  const bool known = std::strcmp(name, "direct") == 0 || std::strcmp(name, "winograd2") == 0 || std::strcmp(name, "winograd4") == 0;
  return known ? nullptr : "filters of any strides are packed for direct, winograd2 and winograd4 only";
}

void pack_strided(const PackStridedArgs& a) {
  const char* name = kConvKernels.name(a.algorithm);
  parallel(a.threads, [&](const Team& team) {
    if (std::strcmp(name, "winograd4") == 0) pack_winograd<4>(a, team);
    else if (std::strcmp(name, "winograd2") == 0) pack_winograd<2>(a, team);
    else pack_direct(a, team);
  });
}

}  // namespace RF_ISA
}  // namespace rf
