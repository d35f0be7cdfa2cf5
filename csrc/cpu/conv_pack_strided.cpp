// Packs float32 filters of any strides for "direct", "winograd2" and "winograd4": what a training step does to weights that
// change every step, forward, and (K and C exchanged, R and S strides negative) for the data gradient.
// Bytes: the filters once, the packed ones once: 1 float for 1 (direct), 36 or 16 for 9 (Winograd).
// The idea: kPanel output channels are a vector and 16 input channels a block, so that reading, G g G^T and writing
// all run over vectors; conv_pack's one filter at a time takes 15 ms for 512 x 512 x 3 x 3, more than the convolution.
// The transform stays in double and in conv_pack's order: the same bits. Words of two bf16 take channels two by two.
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

// Lines of kPanel filters as one word each: one channel's floats, or two channels rounded to bf16 and interleaved.
RF_INLINE void put_line(float* out, const float* line, const float*, bool streamed) {
  for (int j = 0; j < kPanel; j += kLanes) streamed ? stream(out + j, load(line + j)) : store(out + j, load(line + j));
}
#if defined(__AVX512BF16__)
RF_INLINE void put_line(Pair* out, const float* low, const float* high, bool streamed) {
  for (int j = 0; j < kPanel; j += kLanes) {
    const __m512i a = _mm512_cvtepu16_epi32(narrow(load(low + j).v)), b = _mm512_cvtepu16_epi32(narrow(load(high + j).v));
    const __m512i word = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    streamed ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out + j), word) : _mm512_storeu_si512(out + j, word);
  }
}
#endif

template <class Word>
void pack_direct(const PackStridedArgs& a, const Team& team) {
  constexpr int kElements = WordOf<Word>::kElements;
  const ConvShape& s = a.shape;
  const DirectPlan p = direct_plan<Word>(s);
  const Range panels = team.share(p.panels);
  alignas(64) float lines[kDepth * kPanel];
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    Word* out = static_cast<Word*>(a.packed) + panel * p.words * kPanel;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t t = 0; t < s.S; ++t)
        for (int64_t c = 0; c < s.C; c += kDepth) {
          const int depth = int(smaller(int64_t(kDepth), s.C - c));
          Source{a}.read(panel, c, depth, r, t, lines);
          Word* to = out + ((r * s.S + t) * s.C + c) / kElements * kPanel;
          for (int i = 0; i < depth; i += kElements) put_line(to + i / kElements * kPanel, lines + i * kPanel, lines + (i + kElements - 1) * kPanel, false);
        }
    const int64_t used = p.depth / kElements;
    std::memset(static_cast<void*>(out + used * kPanel), 0, size_t((p.words - used) * kPanel) * sizeof(Word));
  }
}

template <int M, class Word>
void pack_winograd(const PackStridedArgs& a, const Team& team) {
  constexpr int kT = M + 2, kElements = WordOf<Word>::kElements;
  const ConvShape& s = a.shape;
  const WinogradPlan<M, Word> p(s, {});
  double g[kT][3];
  winograd_filter_matrix<M>(g);
  alignas(64) float taps[9][kDepth * kPanel];
  alignas(64) double half[kElements][kT][3][kPanel];
  // The points lie a power of two apart and would evict each other from one L1 set.
  const bool streamed = p.weight_bytes() >= kStreamBytes && reinterpret_cast<uintptr_t>(a.packed) % 64 == 0;
  const Range panels = team.share(p.panels);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    for (int64_t c0 = 0; c0 < p.words * kElements; c0 += kDepth) {
      const int depth = int(smaller(larger(s.C - c0, int64_t(0)), int64_t(kDepth)));
      for (int t = 0; t < 9; ++t) Source{a}.read(panel, c0, depth, t / 3, t % 3, taps[t]);
      for (int c = 0; c < smaller(int64_t(kDepth), p.words * kElements - c0); c += kElements) {
        Word* out = static_cast<Word*>(a.packed) + (panel * p.words + (c0 + c) / kElements) * kPanel;
        const int64_t point = p.panels * p.words * kPanel;
        if (c >= depth) {
          for (int i = 0; i < kT * kT; ++i) std::memset(static_cast<void*>(out + i * point), 0, kPanel * sizeof(Word));
          continue;
        }
        for (int e = 0; e < kElements; ++e)
          for (int i = 0; i < kT; ++i)
            for (int x = 0; x < 3; ++x) {
              const float *f0 = taps[x] + (c + e) * kPanel, *f1 = taps[3 + x] + (c + e) * kPanel, *f2 = taps[6 + x] + (c + e) * kPanel;
              for (int j = 0; j < kPanel; ++j) half[e][i][x][j] = g[i][0] * f0[j] + g[i][1] * f1[j] + g[i][2] * f2[j];
            }
        for (int i = 0; i < kT; ++i)
          for (int l = 0; l < kT; ++l) {
            alignas(64) float line[kElements][kPanel];
            for (int e = 0; e < kElements; ++e)
              for (int j = 0; j < kPanel; ++j) line[e][j] = float(half[e][i][0][j] * g[l][0] + half[e][i][1][j] * g[l][1] + half[e][i][2][j] * g[l][2]);
            put_line(out + (i * kT + l) * point, line[0], line[kElements - 1], streamed);
          }
      }
    }
  }
  if (streamed) stream_fence();
}

}  // namespace

const char* pack_strided_why_not(const ConvShape& s, DType t, int algorithm) {
  if (s.groups != 1) return "filters of any strides are packed for groups = 1 only";
  if (t == DType::bf16 && s.C % WordOf<Bf16Word>::kElements) return "filters of any strides are packed for an even number of input channels in bfloat16";
  if (const char* why = kConvKernels.why_not(s, t, algorithm)) return why;
  const char* name = kConvKernels.name(algorithm);
  const bool known = std::strcmp(name, "direct") == 0 || std::strcmp(name, "winograd2") == 0 || std::strcmp(name, "winograd4") == 0;
  return known ? nullptr : "filters of any strides are packed for direct, winograd2 and winograd4 only";
}

template <class Word>
static void pack_words(const PackStridedArgs& a) {
  const char* name = kConvKernels.name(a.algorithm);
  parallel(a.threads, [&](const Team& team) {
    if (std::strcmp(name, "winograd4") == 0) pack_winograd<4, Word>(a, team);
    else if (std::strcmp(name, "winograd2") == 0) pack_winograd<2, Word>(a, team);
    else pack_direct<Word>(a, team);
  });
}

void pack_strided(const PackStridedArgs& a) { a.dtype == DType::f32 ? pack_words<float>(a) : pack_words<Bf16Word>(a); }

}  // namespace RF_ISA
}  // namespace rf
