// Filters of any strides, packed panel by panel: what conv_pack_strided.cpp packs whole and conv_streamed.cpp a panel
// at a time. kPanel output channels are a vector and 16 input channels a block, so that reading, G g G^T and writing
// all run over vectors. The transform stays in double and in conv_pack's order: the same bits. Words of two bf16 take
// channels two by two.
#pragma once
#include "../conv_backward.h"
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

const char* pack_strided_why_not(const ConvShape&, DType, int algorithm);

namespace {  // each translation unit its own: nothing here is large

constexpr size_t kStreamedFilters = 8u << 20;  // packed filters this large will not wait in the caches anyway
constexpr int kDepth = 16;                     // input channels of a block: a line of channels_last filters

// Filters [panel * kPanel, + cols) by channels [c0, + depth) of tap (r, s) as [channel][kPanel], zeros beyond cols.
struct Source {
  const PackStridedArgs& a;
  void read(int64_t panel, int64_t c0, int depth, int64_t r, int64_t s, float* out) const {
    const int64_t k0 = panel * kPanel;
    const int cols = int(smaller(int64_t(kPanel), a.shape.K - k0));
    const float* w = a.w + k0 * a.stride_k + c0 * a.stride_c + r * a.stride_r + s * a.stride_s;
    if (cols < kPanel) std::memset(out, 0, size_t(depth) * kPanel * sizeof(float));
    // The block after this one is asked for meanwhile: its lines lie a row of filters apart, which no hardware
    // foresees.
    if (a.stride_k == 1 && cols == kPanel) {
      for (int c = 0; c < depth; ++c) {
        const float* from = w + c * a.stride_c;
        __builtin_prefetch(from + depth * a.stride_c);
        __builtin_prefetch(from + depth * a.stride_c + kLanes);
        store(out + c * kPanel, load(from));
        store(out + c * kPanel + kLanes, load(from + kLanes));
      }
      return;
    }
    if (a.stride_c == 1 && cols == kPanel && depth == kDepth) {
      for (int k = 0; k < kPanel; ++k) __builtin_prefetch(w + k * a.stride_k + kDepth);
      for (int k = 0; k < kPanel; k += 4)
        for (int c = 0; c < kDepth; c += 4)
          transpose4(w + k * a.stride_k + c, a.stride_k, out + c * kPanel + k, kPanel);
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
    const __m512i a = _mm512_cvtepu16_epi32(narrow(load(low + j).v)),
                  b = _mm512_cvtepu16_epi32(narrow(load(high + j).v));
    const __m512i word = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    streamed ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out + j), word) : _mm512_storeu_si512(out + j, word);
  }
}
#endif

// G g G^T of kPanel filters and one channel, their taps at taps[3 r + s] + at.
template <class H, class W>
RF_INLINE void transform_filters(const WinogradFilter<H, W>& g, const float (&taps)[9][kDepth * kPanel], int at,
                                 float (&lines)[kFilters<H, W>][kPanel]) {
  constexpr int kWide = 8;
  typedef float Floats __attribute__((vector_size(kWide * sizeof(float))));
  for (int j = 0; j < kPanel; j += kWide) {
    Doubles f[9], half[kFilterPoints<H>][3];
    RF_UNROLL for (int t = 0; t < 9; ++t) {
      Floats narrow;
      std::memcpy(&narrow, taps[t] + at + j, sizeof narrow);
      f[t] = __builtin_convertvector(narrow, Doubles);
    }
    RF_UNROLL for (int x = 0; x < 3; ++x) line_filters<H>(
        g.h, [&](int r) __attribute__((always_inline)) -> const Doubles& { return f[3 * r + x]; },
        [&](int i, const Doubles& v) __attribute__((always_inline)) { half[i][x] = v; });
    RF_UNROLL for (int i = 0; i < kFilterPoints<H>; ++i) line_filters<W>(
        g.w, [&](int x) __attribute__((always_inline)) -> const Doubles& { return half[i][x]; },
        [&](int l, const Doubles& v) __attribute__((always_inline)) {
          const Floats narrow = __builtin_convertvector(v, Floats);
          std::memcpy(lines[i * kFilterPoints<W> + l] + j, &narrow, sizeof narrow);
        });
  }
}

// One panel's points, `point` words apart from `out` on. `streamed`: past the caches.
template <class H, class W, class Word>
void pack_winograd_panel(const PackStridedArgs& a, const WinogradFilter<H, W>& g, int64_t words, int64_t panel,
                         Word* panel_out, int64_t point, bool streamed) {
  constexpr int kPacked = kFilters<H, W>, kElements = WordOf<Word>::kElements;
  const ConvShape& s = a.shape;
  alignas(64) float taps[9][kDepth * kPanel], lines[kElements][kPacked][kPanel];
  for (int64_t c0 = 0; c0 < words * kElements; c0 += kDepth) {
    const int depth = int(smaller(larger(s.C - c0, int64_t(0)), int64_t(kDepth)));
    for (int t = 0; t < 9; ++t) Source{a}.read(panel, c0, depth, t / 3, t % 3, taps[t]);
    for (int c = 0; c < smaller(int64_t(kDepth), words * kElements - c0); c += kElements) {
      Word* out = panel_out + (c0 + c) / kElements * kPanel;
      if (c >= depth) {
        for (int i = 0; i < kPacked; ++i) std::memset(static_cast<void*>(out + i * point), 0, kPanel * sizeof(Word));
        continue;
      }
      for (int e = 0; e < kElements; ++e) transform_filters(g, taps, (c + e) * kPanel, lines[e]);
      for (int i = 0; i < kPacked; ++i) put_line(out + i * point, lines[0][i], lines[kElements - 1][i], streamed);
    }
  }
}

template <class H, class W, class Word>
void pack_winograd(const PackStridedArgs& a, const Team& team) {
  const WinogradPlan<H, W, Word> p(a.shape, {});
  const WinogradFilter<H, W> g;
  // The points lie a power of two apart and would evict each other from one L1 set.
  const bool streamed = p.weight_bytes() >= kStreamedFilters && reinterpret_cast<uintptr_t>(a.packed) % 64 == 0;
  team.each(p.panels, [&](int64_t panel) {
    pack_winograd_panel<H, W, Word>(a, g, p.words, panel, static_cast<Word*>(a.packed) + panel * p.words * kPanel,
                                    p.panels * p.words * kPanel, streamed);
  });
  if (streamed) stream_fence();
}

}  // namespace

}  // namespace RF_ISA
}  // namespace rf
