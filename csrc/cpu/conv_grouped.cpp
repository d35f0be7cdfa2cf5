// "grouped": as many filters as channels in a group, the group a divisor of the vector (1: depthwise, 4 and 8:
// ResNeXt). 2*N*P*Q*K*R*S*(C/groups) flops, every lane of every multiply-add useful.
// A vector holds whole groups; channel j of each group is spread over its lanes by one permutation. Input rows are
// copied to a padded float buffer of one vector of channels, so borders and bf16 cost nothing inside the loops;
// at stride 1 one permuted pixel feeds the three taps of a 3-wide filter, which leaves multiply-adds the bottleneck.
#include "conv_algorithms.h"

namespace rf {
namespace RF_ISA {

namespace {

struct Plan {
  int64_t per_group, vectors, columns, block_rows, row_floats;
  size_t buffer_bytes;
};

Plan plan_of(const ConvShape& s, const ConvConfig& c) {
  Plan p;
  p.per_group = s.C / s.groups;
  p.vectors = ceil_div(s.C, int64_t(kLanes));
  p.columns = (s.Q - 1) * s.stride_w + (s.S - 1) * s.dilation_w + 1;
  p.block_rows = smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
  p.row_floats = p.columns * kLanes;
  const int64_t rows = (p.block_rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
  p.buffer_bytes = odd_lines(size_t(rows * p.row_floats) * sizeof(float));
  return p;
}

const char* why_not(const ConvShape& s, DType) {
  if (s.planar) return "grouped reads NHWC only";
  if (s.groups == 1) return "grouped needs more than one group";
  if (s.C != s.K) return "grouped needs as many filters as channels";
  if (kLanes % (s.C / s.groups) != 0) return "grouped needs channels per group that divide the vector";
  return nullptr;
}

ConvConfig defaults(const ConvShape&, DType, int) { return {}; }

size_t packed_bytes(const ConvShape& s, DType) {
  return size_t(ceil_div(s.C, int64_t(kLanes)) * s.R * s.S * (s.C / s.groups) * kLanes) * sizeof(float);
}

// packed: [vector][r][j][s][lane]: lane k holds w[k, j, r, s].
void pack(const ConvShape& s, DType, void* packed, const float* w, const float* fold, int) {
  float* out = static_cast<float*>(packed);
  const int64_t per_group = s.C / s.groups;
  for (int64_t first = 0; first < s.K; first += kLanes) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = 0; j < per_group; ++j) {
        for (int64_t t = 0; t < s.S; ++t) {
          for (int64_t k = first; k < first + kLanes; ++k)
            *out++ = k < s.K ? w[((k * per_group + j) * s.R + r) * s.S + t] * (fold ? fold[k] : 1.f) : 0.f;
        }
      }
    }
  }
}

size_t scratch_bytes(const ConvShape& s, DType, const ConvConfig& c, int threads) {
  return plan_of(s, c).buffer_bytes * size_t(threads);
}

// sums[i] for kPixels neighbours in a row. x: the first pixel's first tap; steps in floats.
struct Steps {
  int64_t pixel, tap, row;
};

template <int kPixels, int kTaps, bool kDepthwise>
void sum_pixels(const ConvShape& s, const float* x, const Steps& step, const float* w, float* sums) {
  const int per_group = int(s.C / s.groups);
  Vec acc[kPixels];
  RF_UNROLL for (int i = 0; i < kPixels; ++i) acc[i] = zero();
  alignas(64) int32_t from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) from[lane] = lane & -per_group;  // the group's first channel
  const Lanes first = load_lanes(from);
  for (int64_t r = 0; r < s.R; ++r, x += step.row) {
    Lanes lanes = first;
    for (int j = 0; j < per_group; ++j, lanes = next(lanes)) {
      const float* tap = x;
      for (int64_t t = 0; t < s.S; t += kTaps, tap += kTaps * step.tap, w += kTaps * kLanes) {
        Vec filter[kTaps];
        RF_UNROLL for (int k = 0; k < kTaps; ++k) filter[k] = load(w + k * kLanes);
        // Pixel i of the input meets tap k at output i - k (kTaps > 1 only where neighbours are one step apart).
        RF_UNROLL for (int i = 0; i < kPixels + kTaps - 1; ++i) {
          const Vec pixel = load(tap + i * (kTaps > 1 ? kLanes : step.pixel));
          const Vec value = kDepthwise ? pixel : permute(pixel, lanes);
          RF_UNROLL for (int k = 0; k < kTaps; ++k) {
            if (i - k >= 0 && i - k < kPixels) acc[i - k] = fma(value, filter[k], acc[i - k]);
          }
        }
      }
    }
  }
  RF_UNROLL for (int i = 0; i < kPixels; ++i) store(sums + i * kLanes, acc[i]);
}

using SumPixels = void (*)(const ConvShape&, const float*, const Steps&, const float*, float*);

template <int kPixels>
SumPixels pick(const ConvShape& s) {
  const bool neighbours = s.S == 3 && s.stride_w == 1 && s.dilation_w == 1;
  if (s.C == s.groups) return neighbours ? sum_pixels<kPixels, 3, true> : sum_pixels<kPixels, 1, true>;
  return neighbours ? sum_pixels<kPixels, 3, false> : sum_pixels<kPixels, 1, false>;
}

template <class T>
class Run {
 public:
  Run(const ConvArgs& args, const Team& team) : a_(args), s_(args.shape), p_(plan_of(args.shape, args.config)) {
    rows_ = reinterpret_cast<float*>(static_cast<char*>(a_.scratch) + p_.buffer_bytes * size_t(team.rank));
    const int64_t blocks = ceil_div(s_.P, p_.block_rows);
    const Range mine = team.share(s_.N * blocks * p_.vectors);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t vector = i % p_.vectors, block = i / p_.vectors % blocks, n = i / p_.vectors / blocks;
      const Range out = {block * p_.block_rows, smaller((block + 1) * p_.block_rows, s_.P)};
      channels_ = int(smaller(s_.C - vector * kLanes, int64_t(kLanes)));
      copy_rows(n, out, vector * kLanes);
      compute(n, out, vector);
    }
  }

 private:
  void copy_rows(int64_t n, Range out, int64_t c) {
    const T* x = static_cast<const T*>(a_.x) + c;
    const int64_t first = out.begin * s_.stride_h - s_.pad_h;
    const int64_t last = (out.end - 1) * s_.stride_h - s_.pad_h + (s_.R - 1) * s_.dilation_h;
    float* to = rows_;
    for (int64_t h = first; h <= last; ++h) {
      const T* row = x + (n * s_.H + h) * s_.W * s_.C;
      for (int64_t w = -s_.pad_w; w < p_.columns - s_.pad_w; ++w, to += kLanes) {
        const bool inside = h >= 0 && h < s_.H && w >= 0 && w < s_.W;
        store(to, !inside ? zero() : channels_ == kLanes ? load(row + w * s_.C) : load_n(row + w * s_.C, channels_));
      }
    }
  }

  void compute(int64_t n, Range out, int64_t vector) {
    const int64_t taps = s_.R * s_.S * p_.per_group, k = vector * kLanes;
    const float* w = static_cast<const float*>(a_.packed) + vector * taps * kLanes;
    const Steps step = {s_.stride_w * kLanes, s_.dilation_w * kLanes, s_.dilation_h * p_.row_floats};
    constexpr int kMany = kTileRows, kSome = kTileRows / 2;
    const int64_t width = s_.Q >= kMany ? kMany : s_.Q >= kSome ? kSome : 1;
    const SumPixels sum = width == kMany ? pick<kMany>(s_) : width == kSome ? pick<kSome>(s_) : pick<1>(s_);
    const Vec scale = a_.scale ? load_n(a_.scale + k, channels_) : broadcast(1.f);
    const Vec shift = a_.shift ? load_n(a_.shift + k, channels_) : zero();
    for (int64_t p = out.begin; p < out.end; ++p) {
      const float* row = rows_ + (p - out.begin) * s_.stride_h * p_.row_floats;
      for (int64_t done = 0; done < s_.Q;) {
        // The last tile is moved back to be full; what it computes again is not stored again.
        const int64_t q = smaller(done, s_.Q - width);
        alignas(64) float sums[kMany * kLanes];
        sum(s_, row + q * step.pixel, step, w, sums);
        const int64_t at = ((n * s_.P + p) * s_.Q + done) * s_.K + k;
        finish_pixels(sums + (done - q) * kLanes, q + width - done, at, scale, shift);
        done = q + width;
      }
    }
  }

  void finish_pixels(const float* sums, int64_t count, int64_t at, Vec scale, Vec shift) {
    T* y = static_cast<T*>(a_.y) + at;
    const T* residual = a_.residual ? static_cast<const T*>(a_.residual) + at : nullptr;
    for (int64_t i = 0; i < count; ++i, y += s_.K) {
      Vec v = fma(load(sums + i * kLanes), scale, shift);
      if (residual) v = v + load_n(residual + i * s_.K, channels_);
      if (a_.relu) v = relu(v);
      channels_ == kLanes ? store(y, v) : store_n(y, v, channels_);
    }
  }

  const ConvArgs& a_;
  const ConvShape& s_;
  const Plan p_;
  float* rows_;
  int channels_ = kLanes;
};

void run(const ConvArgs& a, const Team& team) {
  if (a.dtype == DType::f32) {
    Run<float>(a, team);
  } else {
    Run<bf16>(a, team);
  }
}

}  // namespace

extern const Algorithm kGrouped;
const Algorithm kGrouped = {"grouped", 1, 1, why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
