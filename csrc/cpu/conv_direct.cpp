// "direct" in float32, and its doors for both dtypes.
#include "conv_direct.h"

namespace rf {
namespace RF_ISA {

void direct_bf16(const ConvArgs&, const Team&);  // conv_direct_bf16.cpp

static const char* why_not(const ConvShape& s, DType) { return s.planar ? "direct reads NHWC only" : nullptr; }
static ConvConfig defaults(const ConvShape& s, DType, int threads) {
  ConvConfig c;
  c.split_cols = s.groups == 1 && prefer_split_cols(s.N * s.P * s.Q, s.K, threads);
  return c;
}
static size_t packed_bytes(const ConvShape& s, DType t) {
  return t == DType::f32 ? direct_packed_bytes<float>(s) : direct_packed_bytes<Bf16Word>(s);
}
static void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int threads) {
  t == DType::f32 ? direct_pack<float>(s, packed, w, fold, threads)
                  : direct_pack<Bf16Word>(s, packed, w, fold, threads);
}
static size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
  return t == DType::f32 ? direct_scratch_bytes<float>(s, c, threads) : direct_scratch_bytes<Bf16Word>(s, c, threads);
}
static void run(const ConvArgs& a, const Team& team) {
  a.dtype == DType::f32 ? direct_run<float, float>(a, team) : direct_bf16(a, team);
}

// Rows that are shared, and written whole: a thread then has every channel of its chunks of rows.
static bool takes_moments(const ConvShape& s, const ConvConfig& c) { return !c.split_cols && s.groups == 1; }
// What is gathered once, without borders to stay zero; rounded as the norm's own pass would.
static bool takes_norm(const ConvShape& s, DType t, const ConvConfig& c) {
  const bool stored = t == DType::f32 || sizeof(WordOf<Bf16Word>::Element) == sizeof(bf16);
  const int64_t chunk = t == DType::f32 ? kChunk<float> : kChunk<Bf16Word>;
  return stored && !c.split_cols && s.groups == 1 && s.R * s.S == 1 && s.pad_h + s.pad_w == 0 && s.C % chunk == 0;
}

const Algorithm kDirect = {"direct",      1,         1, why_not, defaults, packed_bytes, pack, scratch_bytes, run,
                           takes_moments, takes_norm};

}  // namespace RF_ISA
}  // namespace rf
