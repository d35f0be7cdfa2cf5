// Packs float32 filters of any strides for "direct", "grouped", "strassen" and the Winograd algorithms: what a training
// step does to weights that change every step, forward, and (K and C exchanged, R and S strides negative) for the data
// gradient. Bytes: the filters once, the packed ones once: 1 float for 1 (direct), 7 for 4 (Strassen), 36, 24 or 16 for
// 9 (Winograd). The idea: kPanel output channels are a vector and 16 input channels a block, so that reading, G g
// G^T and writing all run over vectors; conv_pack's one filter at a time takes 15 ms for 512 x 512 x 3 x 3, more than
// the convolution. The transform stays in double and in conv_pack's order: the same bits. Words of two bf16 take
// channels two by two.
#include "conv_pack_strided.h"

#include "conv_direct.h"
#include "conv_strassen.h"
#include "grouped.h"

namespace rf {
namespace RF_ISA {

extern const ConvKernels kConvKernels;  // conv.cpp

namespace {

template <class Word>
void pack_direct(PackStridedArgs a, const Team& team) {
  constexpr int kElements = WordOf<Word>::kElements;
  const DirectPlan p = direct_plan<Word>(a.shape);
  const int64_t groups = a.shape.groups;
  ConvShape& s = a.shape;  // of one group from here on, as w is the group's
  s.K = p.cols, s.C = p.channels, s.groups = 1;
  const float* w = a.w;
  team.each(groups * p.panels, [&](int64_t i) {
    alignas(64) float lines[kDepth * kPanel];
    const int64_t panel = i % p.panels;
    a.w = w + i / p.panels * a.stride_group;
    Word* out = static_cast<Word*>(a.packed) + i * p.words * kPanel;
    for (int64_t r = 0; r < s.R; ++r)
      for (int64_t t = 0; t < s.S; ++t)
        for (int64_t c = 0; c < s.C; c += kDepth) {
          const int depth = int(smaller(int64_t(kDepth), s.C - c));
          Source{a}.read(panel, c, depth, r, t, lines);
          Word* to = out + ((r * s.S + t) * s.C + c) / kElements * kPanel;
          for (int d = 0; d < depth; d += kElements)
            put_line(to + d / kElements * kPanel, lines + d * kPanel, lines + (d + kElements - 1) * kPanel, false);
        }
    const int64_t used = p.depth / kElements;
    std::memset(static_cast<void*>(out + used * kPanel), 0, size_t((p.words - used) * kPanel) * sizeof(Word));
  });
}

}  // namespace

const char* pack_strided_why_not(const ConvShape& s, DType t, int algorithm) {
  if (t == DType::bf16 && s.C / s.groups % WordOf<Bf16Word>::kElements)
    return "filters of any strides are packed for an even number of input channels in bfloat16";
  if (const char* why = kConvKernels.why_not(s, t, algorithm)) return why;
  const char* name = kConvKernels.name(algorithm);
  for (const char* known :
       {"direct", "grouped", "winograd4", "winograd4x2", "winograd2", "winograd4_strided", "strassen"}) {
    if (std::strcmp(name, known) == 0) return nullptr;
  }
  return "filters of any strides are packed for direct, grouped, strassen and the Winograd algorithms of 3x3 filters";
}

template <class Word>
static void pack_words(const PackStridedArgs& a) {
  const char* name = kConvKernels.name(a.algorithm);
  parallel(a.threads, [&](const Team& team) {
    if (std::strcmp(name, "winograd4") == 0)
      pack_winograd<Line4, Line4, Word>(a, team);
    else if (std::strcmp(name, "winograd2") == 0)
      pack_winograd<Line2, Line2, Word>(a, team);
    else if (std::strcmp(name, "winograd4x2") == 0)
      pack_winograd<Line4, Line2, Word>(a, team);
    else if (std::strcmp(name, "winograd4_strided") == 0)
      pack_winograd<LineStrided4, LineStrided4, Word>(a, team);
    else if (std::strcmp(name, "strassen") == 0)
      strassen_pack_panels(a, nullptr, team);
    else if (std::strcmp(name, "grouped") == 0)
      pack_grouped(a, team);
    else
      pack_direct<Word>(a, team);
  });
}

void pack_strided(const PackStridedArgs& a) { a.dtype == DType::f32 ? pack_words<float>(a) : pack_words<Bf16Word>(a); }

}  // namespace RF_ISA
}  // namespace rf
