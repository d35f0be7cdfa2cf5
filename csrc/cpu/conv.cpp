// The doors of ConvKernels: the list of algorithms, and which one a shape gets.
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

static const Algorithm* const kAlgorithms[] = {&kDirect,  &kWinograd4, &kWinograd4x2,  &kWinograd2, &kWinograd4Strided,
                                               &kGrouped, &kStem,      &kWinogradStem, &kStrassen};
constexpr int kCount = int(sizeof(kAlgorithms) / sizeof(kAlgorithms[0]));

static int algorithms() { return kCount; }
static const char* name(int algorithm) { return kAlgorithms[algorithm]->name; }
static int tile_rows(int algorithm) { return kAlgorithms[algorithm]->high; }
static const char* why_not(const ConvShape& s, DType t, int algorithm) { return kAlgorithms[algorithm]->why_not(s, t); }
static size_t packed_bytes(const ConvShape& s, DType t, int algorithm) {
  return kAlgorithms[algorithm]->packed_bytes(s, t);
}
static void pack(const ConvShape& s, DType t, int algorithm, void* packed, const float* w, const float* fold,
                 int threads) {
  kAlgorithms[algorithm]->pack(s, t, packed, w, fold, threads);
}
static size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
  return kAlgorithms[c.algorithm]->scratch_bytes(s, t, c, threads);
}
static void run(const ConvArgs& a, int rank, int size, void* barrier) {
  kAlgorithms[a.config.algorithm]->run(a, Team{rank, size, static_cast<Barrier*>(barrier)});
}
static bool takes_moments(const ConvShape& s, const ConvConfig& c) {
  const Algorithm& a = *kAlgorithms[c.algorithm];
  return a.takes_moments && a.takes_moments(s, c);
}
static bool takes_norm(const ConvShape& s, DType t, const ConvConfig& c) {
  const Algorithm& a = *kAlgorithms[c.algorithm];
  return a.takes_norm && a.takes_norm(s, t, c);
}
static void run_alone(const ConvArgs& a, int threads) {
  parallel(threads, [&](const Team& team) { kAlgorithms[a.config.algorithm]->run(a, team); });
}

enum {
  kDirectIndex,
  kWinograd4Index,
  kWinograd4x2Index,
  kWinograd2Index,
  kWinograd4StridedIndex,
  kGroupedIndex,
  kStemIndex,
  kWinogradStemIndex,
  kStrassenIndex
};

// Sharing the rows, every thread reads all weights; sharing the output channels, all of the gathered input, with
// barriers. Few rows and many channels (the last stages at batch 1, the linear layer) want the latter: at 7x7x512 and
// 14x14x256 it took 0.67 of the time, at 28x28x128 (weights 2.6 times the input) 1.4 of it.
static bool weights_rule(const ConvShape& s, DType t, int algorithm, int threads) {
  if (s.groups != 1 || algorithm >= kGroupedIndex || s.K < 2 * kPanel * threads) return false;
  const int64_t high = kAlgorithms[algorithm]->high, wide = kAlgorithms[algorithm]->wide;
  const int64_t rows = s.N * ceil_div(s.P, high) * ceil_div(s.Q, wide);
  const int64_t depth = ((high - 1) * s.stride_h + s.R) * ((wide - 1) * s.stride_w + s.S) * s.C;
  return packed_bytes(s, t, algorithm) > size_t(6 * rows * depth) * dtype_size(t);
}

// Its additions cost what 35 channels do, its filters, 7 for 4, want rows to be used on. On two cores it took 0.82 to
// 0.95 of direct's time, as much with 64 channels and 256 filters, 1.02 to 1.2 of it with the 49 rows of 7x7 at
// batch 1.
static bool strassen_pays(const ConvShape& s) {
  return (s.C >= 128 || s.K <= 64) && s.N * s.P * s.Q >= int64_t(28 * kTileRows);
}

// Winograd wherever it can, the largest tiles but for the last stage at small batch: few tiles, and 36 or 24 weights
// for every 9. With stride 2 it saves less. Strassen for 1x1 where it pays.
static ConvConfig heuristic(const ConvShape& s, DType t, int threads, bool exact) {
  ConvConfig c;
  if (!exact && why_not(s, t, kWinogradStemIndex) == nullptr) {
    c.algorithm = kWinogradStemIndex;
  } else if (why_not(s, t, kStemIndex) == nullptr) {
    c.algorithm = kStemIndex;
  } else if (why_not(s, t, kGroupedIndex) == nullptr) {
    c.algorithm = kGroupedIndex;
  } else if (!exact && why_not(s, t, kWinograd2Index) == nullptr && s.C >= 16 && s.K >= 16) {
    const bool whole = t == DType::f32;
    const int64_t tiles = s.N * ceil_div(s.P, int64_t(4)) * ceil_div(s.Q, int64_t(whole ? 4 : 2));
    c.algorithm = tiles <= (whole ? 8 : 20) ? kWinograd2Index : whole ? kWinograd4Index : kWinograd4x2Index;
  } else if (!exact && why_not(s, t, kWinograd4StridedIndex) == nullptr && s.C >= 16 && s.K >= 16) {
    const int64_t tiles = s.N * ceil_div(s.P, int64_t(4)) * ceil_div(s.Q, int64_t(4));
    if (tiles > 28) c.algorithm = kWinograd4StridedIndex;
  } else if (!exact && why_not(s, t, kStrassenIndex) == nullptr && strassen_pays(s)) {
    c.algorithm = kStrassenIndex;
  }
  const int chosen = c.algorithm;
  c = kAlgorithms[chosen]->defaults(s, t, threads);
  c.algorithm = chosen;
  if (threads > 1 && weights_rule(s, t, chosen, threads)) {
    c.split_cols = 1;
    c.block_rows = 4 * kTileRows;
  }
  return c;
}

static bool same(const ConvConfig& a, const ConvConfig& b) {
  return a.algorithm == b.algorithm && a.block_rows == b.block_rows && a.block_cols == b.block_cols &&
         a.split_cols == b.split_cols;
}

static int candidates(const ConvShape& s, DType t, int threads, ConvConfig* out, int max) {
  int n = 0;
  const auto offer = [&](const ConvConfig& c) {
    for (int i = 0; i < n; ++i) {
      if (same(out[i], c)) return;
    }
    if (n < max) out[n++] = c;
  };
  offer(heuristic(s, t, threads, false));
  for (int a = 0; a < kCount; ++a) {
    if (why_not(s, t, a)) continue;
    if (a >= kGroupedIndex) {
      const int least = a == kStrassenIndex ? 2 * kTileRows : 4;
      for (int rows = least; rows <= 4 * least; rows *= 2) {
        ConvConfig c;
        c.algorithm = a;
        c.block_rows = rows;
        offer(c);
      }
      continue;
    }
    const bool winograd = a != kDirectIndex;
    for (int split = 0; split < (threads > 1 && s.groups == 1 ? 2 : 1); ++split) {
      for (int rows = kTileRows; rows <= 4 * kTileRows; rows *= 2) {
        for (int cols = 64; cols <= 128; cols += 64) {
          if (cols > 64 && (!winograd || s.K < cols)) continue;
          ConvConfig c;
          c.algorithm = a;
          c.block_rows = rows;
          c.block_cols = winograd ? cols : 0;
          c.split_cols = split;
          offer(c);
        }
      }
    }
  }
  return n;
}

extern const ConvKernels kConvKernels;
const ConvKernels kConvKernels = {algorithms,    name, tile_rows,     why_not,    heuristic, packed_bytes, pack,
                                  scratch_bytes, run,  takes_moments, takes_norm, run_alone, candidates};

}  // namespace RF_ISA
}  // namespace rf
