// Winograd with filters that change every step and outweigh their tiles (7x7x512 at batch 16: 37.7 MB for 64 tiles):
// all tiles are transformed once, then every thread packs a panel of its own and multiplies all tiles by it at once.
// Bytes: the filters once from memory; the packed ones, 4 times as many, never leave the caches (packing them whole
// first: written and read again, 75 MB of memory traffic a layer), and the transformed tiles are read from L3 once a
// panel. The same arithmetic in the same order as packing whole: the same bits.
#pragma once
#include "conv_pack_strided.h"
#include "winograd_run.h"

namespace rf {
namespace RF_ISA {

namespace {

// Bytes: worth it; transformed tiles stay in L3, or are few beside filters that would not (3x3 of stride 2, 512
// channels: 38 MB of them packed, as fast either way).
constexpr size_t kLeastFilters = 8u << 20, kMostTiles = 6u << 20, kMostTilesOfMany = 12u << 20;

template <class H, class W, class Word>
struct Streamed {
  ConvConfig config;
  WinogradPlan<H, W, Word> plan;
  int64_t point_words;  // of one panel: odd lines, or all points would share an L1 set
  size_t panel_bytes;

  explicit Streamed(const ConvShape& s) : config(whole(s)), plan(s, config) {
    point_words = int64_t(odd_lines(size_t(plan.words * kPanel) * sizeof(Word)) / sizeof(Word));
    panel_bytes = size_t(point_words) * kFilters<H, W> * sizeof(Word);
  }
  static ConvConfig whole(const ConvShape& s) {
    ConvConfig c;
    c.split_cols = 1;
    c.block_rows = int(s.N * ceil_div(s.P, int64_t(H::kOut)) * ceil_div(s.Q, int64_t(W::kOut)));
    c.block_cols = kPanel;
    return c;
  }
  size_t scratch_bytes(int threads) const {
    const size_t filters = plan.weight_bytes();
    const size_t most = 2 * filters >= 3 * plan.v_bytes ? kMostTilesOfMany : kMostTiles;
    if (filters < kLeastFilters || plan.v_bytes > most || plan.panels < threads) return 0;
    return plan.scratch_bytes(config, threads) + panel_bytes * size_t(threads);
  }
};

template <class H, class W, class T, class Word>
void run_streamed(ConvArgs a, const PackStridedArgs& filters, int threads) {
  const Streamed<H, W, Word> p(a.shape);
  a.config = p.config;
  char* panels = static_cast<char*>(a.scratch) + p.plan.scratch_bytes(p.config, threads);
  const WinogradFilter<H, W> g;
  parallel(threads, [&](const Team& team) {
    Word* mine = reinterpret_cast<Word*>(panels + p.panel_bytes * size_t(team.rank));
    WinogradRun<H, W, T, Word>(a, team).run_streamed(mine, p.point_words, [&](int64_t panel) {
      pack_winograd_panel<H, W, Word>(filters, g, p.plan.words, panel, mine, p.point_words, false);
    });
  });
}

}  // namespace

}  // namespace RF_ISA
}  // namespace rf
