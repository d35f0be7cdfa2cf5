// Which Winograd convolutions of a training step pack their filters a panel at a time (winograd_streamed.h).
#include "winograd_streamed.h"

namespace rf {
namespace RF_ISA {

extern const ConvKernels kConvKernels;  // conv.cpp

namespace {

bool is(int algorithm, const char* name) { return std::strcmp(kConvKernels.name(algorithm), name) == 0; }

}  // namespace

// 0: packing whole is the better way, or the only one.
size_t streamed_scratch_bytes(const ConvShape& s, DType t, int algorithm, int threads) {
  if (pack_strided_why_not(s, t, algorithm)) return 0;
  if (is(algorithm, "winograd4")) return Streamed<Line4, Line4, float>(s).scratch_bytes(threads);
  if (is(algorithm, "winograd4x2")) return Streamed<Line4, Line2, Bf16Word>(s).scratch_bytes(threads);
  if (is(algorithm, "winograd4_strided"))
    return t == DType::f32 ? Streamed<LineStrided4, LineStrided4, float>(s).scratch_bytes(threads)
                           : Streamed<LineStrided4, LineStrided4, Bf16Word>(s).scratch_bytes(threads);
  if (is(algorithm, "winograd2"))
    return t == DType::f32 ? Streamed<Line2, Line2, float>(s).scratch_bytes(threads)
                           : Streamed<Line2, Line2, Bf16Word>(s).scratch_bytes(threads);
  return 0;
}

template <class H, class W>
static void run_either(const ConvArgs& a, const PackStridedArgs& filters) {
  a.dtype == DType::f32 ? run_streamed<H, W, float, float>(a, filters, filters.threads)
                        : run_streamed<H, W, bf16, Bf16Word>(a, filters, filters.threads);
}

// filters: as for pack_strided, `packed` unused; a.scratch: streamed_scratch_bytes() of it.
void run_streamed(const ConvArgs& a, const PackStridedArgs& filters) {
  if (is(filters.algorithm, "winograd4"))
    run_streamed<Line4, Line4, float, float>(a, filters, filters.threads);
  else if (is(filters.algorithm, "winograd4x2"))
    run_streamed<Line4, Line2, bf16, Bf16Word>(a, filters, filters.threads);
  else if (is(filters.algorithm, "winograd4_strided"))
    run_either<LineStrided4, LineStrided4>(a, filters);
  else
    run_either<Line2, Line2>(a, filters);
}

}  // namespace RF_ISA
}  // namespace rf
