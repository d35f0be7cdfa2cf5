// Winograd with filters that change every step and outweigh their tiles (7x7x512 at batch 16: 37.7 MB for 64 tiles):
// all tiles are transformed once, then every thread packs a panel of its own and multiplies all tiles by it at once.
// Bytes: the filters once from memory; the packed ones, 4 times as many, never leave the caches (packing them whole
// first: written and read again, 75 MB of memory traffic a layer), and the transformed tiles are read from L3 once a
// panel. The same arithmetic in the same order as packing whole: the same bits.
#include "conv_pack_strided.h"
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

extern const ConvKernels kConvKernels;  // conv.cpp

namespace {

constexpr size_t kLeastFilters = 8u << 20, kMostTiles = 6u << 20;  // bytes: worth it; transformed tiles stay in L3

template <int M, int L, class Word>
struct Streamed {
  ConvConfig config;
  WinogradPlan<M, L, Word> plan;
  int64_t point_words;  // of one panel: odd lines, or all points would share an L1 set
  size_t panel_bytes;

  explicit Streamed(const ConvShape& s) : config(whole(s)), plan(s, config) {
    point_words = int64_t(odd_lines(size_t(plan.words * kPanel) * sizeof(Word)) / sizeof(Word));
    panel_bytes = size_t(point_words) * (M + 2) * (L + 2) * sizeof(Word);
  }
  static ConvConfig whole(const ConvShape& s) {
    ConvConfig c;
    c.split_cols = 1;
    c.block_rows = int(s.N * ceil_div(s.P, int64_t(M)) * ceil_div(s.Q, int64_t(L)));
    c.block_cols = kPanel;
    return c;
  }
  size_t scratch_bytes(int threads) const {
    if (plan.weight_bytes() < kLeastFilters || plan.v_bytes > kMostTiles || plan.panels < threads) return 0;
    return plan.scratch_bytes(config, threads) + panel_bytes * size_t(threads);
  }
};

template <int M, int L, class T, class Word>
void run(ConvArgs a, const PackStridedArgs& filters, int threads) {
  const Streamed<M, L, Word> p(a.shape);
  a.config = p.config;
  char* panels = static_cast<char*>(a.scratch) + p.plan.scratch_bytes(p.config, threads);
  const WinogradFilter<M, L> g;
  parallel(threads, [&](const Team& team) {
    Word* mine = reinterpret_cast<Word*>(panels + p.panel_bytes * size_t(team.rank));
    WinogradRun<M, L, T, Word>(a, team).run_streamed(mine, p.point_words, [&](int64_t panel) {
      pack_winograd_panel<M, L, Word>(filters, g, p.plan.words, panel, mine, p.point_words, false);
    });
  });
}

bool is(int algorithm, const char* name) { return std::strcmp(kConvKernels.name(algorithm), name) == 0; }

}  // namespace

// 0: packing whole is the better way, or the only one.
size_t streamed_scratch_bytes(const ConvShape& s, DType t, int algorithm, int threads) {
  if (pack_strided_why_not(s, t, algorithm)) return 0;
  if (is(algorithm, "winograd4")) return Streamed<4, 4, float>(s).scratch_bytes(threads);
  if (is(algorithm, "winograd4x2")) return Streamed<4, 2, Bf16Word>(s).scratch_bytes(threads);
  if (is(algorithm, "winograd2"))
    return t == DType::f32 ? Streamed<2, 2, float>(s).scratch_bytes(threads)
                           : Streamed<2, 2, Bf16Word>(s).scratch_bytes(threads);
  return 0;
}

// filters: as for pack_strided, `packed` unused; a.scratch: streamed_scratch_bytes() of it.
void run_streamed(const ConvArgs& a, const PackStridedArgs& filters) {
  if (is(filters.algorithm, "winograd4"))
    run<4, 4, float, float>(a, filters, filters.threads);
  else if (is(filters.algorithm, "winograd4x2"))
    run<4, 2, bf16, Bf16Word>(a, filters, filters.threads);
  else if (a.dtype == DType::f32)
    run<2, 2, float, float>(a, filters, filters.threads);
  else
    run<2, 2, bf16, Bf16Word>(a, filters, filters.threads);
}

}  // namespace RF_ISA
}  // namespace rf
