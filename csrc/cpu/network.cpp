// The executor of frozen networks: one parallel region, the steps in order, a barrier where a step needs its
// predecessors. A barrier of two threads costs about 0.2 us against 5 us for opening a region per layer.
// Bytes and flops are those of the steps; the element-wise ones here (layout, scale, add) are memory-bound.
// The one idea: convolution -> max_pool goes through a band of rows that stays in L2, so the stem's 112x112 map
// (3.2 MB an image) is never written. Lost: a band of one pooled row (too few rows for the convolution's tiles).
#include <math.h>
#include <time.h>

#include "parallel.h"
#include "program.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

void pool_max(const PoolArgs&, int rank, int size);
void pool_average(const PoolArgs&, int rank, int size);
void pool_global_average(const PoolArgs&, int rank, int size);

namespace {

RF_INLINE char* at(const Place& place, void* const* bases) {
  return place.space == Space::none ? nullptr : static_cast<char*>(bases[int(place.space)]) + place.offset;
}

// ---- layout: the caller's NCHW (or NHWC of the other dtype) to NHWC

template <int kC, class Out, class In>
RF_INLINE void interleave(Out* y, const In* x, int64_t pixels, int64_t channels, Range r) {
  const int64_t C = kC ? kC : channels;
  for (int64_t p = r.begin; p < r.end; ++p) {
    for (int64_t c = 0; c < C; ++c) from_float(to_float(x[c * pixels + p]), &y[p * C + c]);
  }
}

template <class Out, class In>
void layout(const Step& s, char* y_bytes, const void* x_base, bool nchw, const Team& team) {
  Out* y = reinterpret_cast<Out*>(y_bytes);
  const In* x = static_cast<const In*>(x_base) + s.x.offset;
  if (!nchw) {
    const Range r = team.share(s.images * s.pixels * s.channels, 64);
    for (int64_t i = r.begin; i < r.end; ++i) from_float(to_float(x[i]), &y[i]);
    return;
  }
  const Range all = team.share(s.images * s.pixels, 64);
  for (int64_t p = all.begin; p < all.end;) {
    const int64_t image = p / s.pixels, first = image * s.pixels;
    const int64_t end = all.end < first + s.pixels ? all.end : first + s.pixels;
    const Range r = {p - first, end - first};
    Out* yi = y + first * s.channels;
    const In* xi = x + first * s.channels;
    // The images of a classifier have three channels: a constant count lets the compiler shuffle whole vectors.
    s.channels == 3 ? interleave<3>(yi, xi, s.pixels, 3, r) : interleave<0>(yi, xi, s.pixels, s.channels, r);
    p = end;
  }
}

void run_layout(const Step& s, char* y, const void* x, const Program& p, const Team& team) {
  if (s.dtype == DType::f32) {
    p.x_dtype == DType::f32 ? layout<float, float>(s, y, x, p.nchw, team) : layout<float, bf16>(s, y, x, p.nchw, team);
  } else {
    p.x_dtype == DType::f32 ? layout<bf16, float>(s, y, x, p.nchw, team) : layout<bf16, bf16>(s, y, x, p.nchw, team);
  }
}

// ---- element-wise steps: f(x, residual, gate) over pixels of channels

enum class Wise { scale, add, relu, sigmoid };

template <Wise kWise>
RF_INLINE Vec wise(Vec x, Vec gate, Vec residual) {
  if (kWise == Wise::scale) return fma(x, gate, residual);
  if (kWise == Wise::add) return x + residual;
  return x;
}

template <Wise kWise, bool kRelu, class T>
RF_INLINE void wise_row(T* y, const T* x, const T* gate, const T* residual, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const Vec g = kWise == Wise::scale ? load(gate + c) : zero();
    const Vec v = wise<kWise>(load(x + c), g, residual ? load(residual + c) : zero());
    store(y + c, kRelu ? relu(v) : v);
  }
  if (c < n) {
    const int m = int(n - c);
    const Vec g = kWise == Wise::scale ? load_n(gate + c, m) : zero();
    const Vec v = wise<kWise>(load_n(x + c, m), g, residual ? load_n(residual + c, m) : zero());
    store_n(y + c, kRelu ? relu(v) : v, m);
  }
}

template <Wise kWise, class T>
void elementwise(const Step& s, char* y_bytes, const char* x_bytes, const char* gate_bytes, const char* residual_bytes,
                 const Team& team) {
  T* y = reinterpret_cast<T*>(y_bytes);
  const T* x = reinterpret_cast<const T*>(x_bytes);
  const T* gate = reinterpret_cast<const T*>(gate_bytes);
  const T* residual = reinterpret_cast<const T*>(residual_bytes);
  if (kWise != Wise::scale) {  // no channel matters: one flat row
    const Range r = team.share(s.images * s.pixels * s.channels, 64);
    const int64_t i = r.begin;
    const T* skip = residual ? residual + i : nullptr;
    s.relu ? wise_row<kWise, true>(y + i, x + i, gate, skip, r.size())
           : wise_row<kWise, false>(y + i, x + i, gate, skip, r.size());
    return;
  }
  const Range pixels = team.share(s.images * s.pixels);
  for (int64_t p = pixels.begin; p < pixels.end; ++p) {
    const int64_t i = p * s.channels;
    const T* g = gate + p / s.pixels * s.channels;
    const T* skip = residual ? residual + i : nullptr;
    s.relu ? wise_row<kWise, true>(y + i, x + i, g, skip, s.channels)
           : wise_row<kWise, false>(y + i, x + i, g, skip, s.channels);
  }
}

template <class T>
void sigmoid(const Step& s, char* y_bytes, const char* x_bytes, const Team& team) {
  T* y = reinterpret_cast<T*>(y_bytes);
  const T* x = reinterpret_cast<const T*>(x_bytes);
  const Range r = team.share(s.images * s.pixels * s.channels, 64);
  for (int64_t i = r.begin; i < r.end; ++i) from_float(1.f / (1.f + expf(-to_float(x[i]))), &y[i]);
}

template <class T>
void run_wise(const Step& s, char* y, const char* x, const char* gate, const char* residual, const Team& team) {
  switch (s.kind) {
    case StepKind::scale:
      return elementwise<Wise::scale, T>(s, y, x, gate, residual, team);
    case StepKind::add:
      return elementwise<Wise::add, T>(s, y, x, gate, residual, team);
    case StepKind::relu:
      return elementwise<Wise::relu, T>(s, y, x, gate, residual, team);
    default:
      return sigmoid<T>(s, y, x, team);
  }
}

// ---- convolution -> max_pool through a band of rows

// Rows of the convolution that the pooled rows [begin, end) read.
RF_INLINE Range rows_read(const PoolArgs& pool, int64_t begin, int64_t end) {
  const int64_t first = begin * pool.stride_h - pool.pad_h;
  const int64_t last = (end - 1) * pool.stride_h - pool.pad_h + pool.kernel_h;
  return {first > 0 ? first : 0, last < pool.H ? last : pool.H};
}

// Each thread has its own rows and runs the convolution as a team of one; rows shared with the band before are
// moved, not computed again, except where a thread's share begins.
void conv_max_pool(const Step& s, char* y, const char* x, char* scratch, const Team& team, ConvRun conv_run) {
  const ConvShape& whole = s.conv.shape;
  const PoolArgs& pool = s.pool;
  const int64_t size = int64_t(dtype_size(s.dtype));
  const int64_t in_row = whole.W * whole.C * size, mid_row = whole.Q * whole.K * size,
                out_row = pool.Q * whole.K * size;
  char* rows = scratch + team.rank * (s.row_bytes + s.scratch_bytes);
  const Range share = team.share(s.images * pool.P);
  Range have = {0, 0};
  int64_t have_image = -1;
  for (int64_t p = share.begin; p < share.end;) {
    const int64_t image = p / pool.P, first = p % pool.P;
    int64_t last = first + s.band < pool.P ? first + s.band : pool.P;
    if (last - first > share.end - p) last = first + share.end - p;
    const Range need = rows_read(pool, first, last);
    int64_t done = need.begin;
    if (have_image == image && have.end > need.begin) {
      std::memmove(rows, rows + (need.begin - have.begin) * mid_row, size_t((have.end - need.begin) * mid_row));
      done = have.end;
    }
    have = need;
    have_image = image;
    if (done < need.end) {
      ConvArgs conv = s.conv;
      const int64_t above = done * whole.stride_h - whole.pad_h;  // the first input row read; negative: padding
      const int64_t below = (need.end - 1) * whole.stride_h - whole.pad_h + (whole.R - 1) * whole.dilation_h + 1;
      const int64_t begin = whole.planar || above < 0 ? 0 : above;
      conv.shape.N = 1;
      conv.shape.H = (whole.planar || below > whole.H ? whole.H : below) - begin;  // a plane cannot be cut
      conv.shape.P = need.end - done;
      conv.shape.pad_h = begin - above;
      conv.x = x + (image * whole.H + begin) * in_row;
      conv.y = rows + (done - need.begin) * mid_row;
      conv.scratch = rows + s.row_bytes;
      Barrier alone(1);
      conv_run(conv, 0, 1, &alone);
    }
    PoolArgs band = pool;
    band.N = 1;
    band.P = last - first;
    band.H = need.size();
    band.pad_h = first * pool.stride_h - pool.pad_h < 0 ? pool.pad_h - first * pool.stride_h : 0;
    band.x = rows;
    band.y = y + p * out_row;
    pool_max(band, 0, 1);
    p += last - first;
  }
}

void run_step(const Step& s, void* const* bases, const Program& program, const Team& team) {
  char* y = at(s.y, bases);
  const char* x = at(s.x, bases);
  const char* residual = at(s.residual, bases);
  switch (s.kind) {
    case StepKind::layout:
      return run_layout(s, y, bases[int(Space::input)], program, team);
    case StepKind::conv: {
      ConvArgs a = s.conv;
      a.y = y;
      a.x = x;
      a.residual = residual;
      a.scratch = at(s.scratch, bases);
      return program.conv_run(a, team.rank, team.size, team.barrier);
    }
    case StepKind::conv_max_pool:
      return conv_max_pool(s, y, x, at(s.scratch, bases), team, program.conv_run);
    case StepKind::max_pool:
    case StepKind::avg_pool:
    case StepKind::global_avg_pool: {
      PoolArgs a = s.pool;
      a.y = y;
      a.x = x;
      if (s.kind == StepKind::max_pool) return pool_max(a, team.rank, team.size);
      if (s.kind == StepKind::avg_pool) return pool_average(a, team.rank, team.size);
      return pool_global_average(a, team.rank, team.size);
    }
    default:
      return s.dtype == DType::f32 ? run_wise<float>(s, y, x, at(s.gate, bases), residual, team)
                                   : run_wise<bf16>(s, y, x, at(s.gate, bases), residual, team);
  }
}

// Not std::chrono: its inline functions would be shared between the instruction sets by the linker.
double milliseconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) * 1e3 + double(t.tv_nsec) * 1e-6;
}

}  // namespace

void network_run(const Program& program, void* const* bases, double* ms) {
  parallel(program.threads, [&](const Team& all) {
    Team team = all;
    team.claims = nullptr;  // where no barrier stands between two steps, a thread reads what it wrote itself
    double before = ms ? milliseconds() : 0;
    for (int i = 0; i < program.count; ++i) {
      const Step& s = program.steps[i];
      run_step(s, bases, program, team);
      if (s.sync || ms) team.sync();
      if (ms && team.rank == 0) {
        const double after = milliseconds();
        ms[i] += after - before;
        before = after;
      }
    }
  });
}

}  // namespace RF_ISA
}  // namespace rf
