// The doors of ConvKernels: the list of algorithms, and which one a shape gets.
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

static const Algorithm* const kAlgorithms[] = {&kDirect};
constexpr int kCount = int(sizeof(kAlgorithms) / sizeof(kAlgorithms[0]));

static int algorithms() { return kCount; }
static const char* name(int algorithm) { return kAlgorithms[algorithm]->name; }
static const char* why_not(const ConvShape& s, DType t, int algorithm) { return kAlgorithms[algorithm]->why_not(s, t); }
static size_t packed_bytes(const ConvShape& s, DType t, int algorithm) { return kAlgorithms[algorithm]->packed_bytes(s, t); }
static void pack(const ConvShape& s, DType t, int algorithm, void* packed, const float* w, const float* fold, int threads) {
  kAlgorithms[algorithm]->pack(s, t, packed, w, fold, threads);
}
static size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
  return kAlgorithms[c.algorithm]->scratch_bytes(s, t, c, threads);
}
static void run(const ConvArgs& a, int rank, int size, void* barrier) {
  kAlgorithms[a.config.algorithm]->run(a, Team{rank, size, static_cast<Barrier*>(barrier)});
}
static void run_alone(const ConvArgs& a, int threads) {
  parallel(threads, [&](const Team& team) { kAlgorithms[a.config.algorithm]->run(a, team); });
}

static ConvConfig heuristic(const ConvShape& s, DType t, int threads, bool exact) {
  (void)exact;
  ConvConfig c = kDirect.defaults(s, t, threads);
  c.algorithm = 0;
  return c;
}

static int candidates(const ConvShape& s, DType t, int threads, ConvConfig* out, int max) {
  int n = 0;
  if (n < max) out[n++] = heuristic(s, t, threads, false);
  return n;
}

extern const ConvKernels kConvKernels;
const ConvKernels kConvKernels = {algorithms, name, why_not, heuristic, packed_bytes, pack, scratch_bytes, run, run_alone, candidates};

}  // namespace RF_ISA
}  // namespace rf
