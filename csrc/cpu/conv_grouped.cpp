// "grouped": as many filters as channels in a group, the group a divisor of the vector (1: depthwise, 4 and 8:
// ResNeXt). 2*N*P*Q*K*R*S*(C/groups) flops, every lane of every multiply-add useful.
// A vector holds whole groups; channel j of each group is spread over its lanes by one permutation. Input rows are
// copied to a padded buffer of one vector of channels, so borders cost nothing inside the loops; at stride 1 one
// permuted pixel feeds the three taps of a 3-wide filter, which leaves multiply-adds the bottleneck, at stride 2 two.
#include "grouped.h"

namespace rf {
namespace RF_ISA {

namespace {

struct Plan {
  int64_t per_group, vectors, columns, block_rows, row_words;
  size_t buffer_bytes;
};

Plan plan_of(const ConvShape& s, DType t, const ConvConfig& c) {
  Plan p;
  p.per_group = s.C / s.groups;
  p.vectors = ceil_div(s.C, int64_t(kLanes));
  p.columns = (s.Q - 1) * s.stride_w + (s.S - 1) * s.dilation_w + 1;
  p.block_rows = smaller(s.P, int64_t(c.block_rows > 0 ? c.block_rows : 8));
  p.row_words = p.columns * (grouped_pairs(s, t) ? kPixelWords<Bf16Word> : kLanes);
  const int64_t rows = (p.block_rows - 1) * s.stride_h + (s.R - 1) * s.dilation_h + 1;
  p.buffer_bytes = odd_lines(size_t(rows * p.row_words) * sizeof(float));
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

size_t packed_bytes(const ConvShape& s, DType t) {
  const int64_t words = s.C / s.groups / (grouped_pairs(s, t) ? 2 : 1);
  return size_t(ceil_div(s.C, int64_t(kLanes)) * s.R * s.S * words * kLanes) * sizeof(float);
}

// packed: [vector][r][word of the group][s][lane]: lane k holds w[k, j, r, s] for the word's channels j.
template <class Word>
void pack_vectors(const PackStridedArgs& a, const float* fold, Range vectors) {
  constexpr int kElements = WordOf<Word>::kElements;
  const ConvShape& s = a.shape;
  const int64_t per_group = s.C / s.groups;
  auto* out = static_cast<typename WordOf<Word>::Element*>(a.packed);
  out += vectors.begin * s.R * s.S * per_group * kLanes;
  for (int64_t first = vectors.begin * kLanes; first < vectors.end * kLanes; first += kLanes) {
    const float* filters[kLanes];
    float factors[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t k = smaller(first + i, s.K - 1);
      filters[i] = a.w + k / per_group * a.stride_group + k % per_group * a.stride_k;
      factors[i] = first + i >= s.K ? 0.f : fold ? fold[k] : 1.f;
    }
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = 0; j < per_group; j += kElements) {
        for (int64_t t = 0; t < s.S; ++t) {
          const int64_t at = j * a.stride_c + r * a.stride_r + t * a.stride_s;
          alignas(64) float line[kElements][kLanes];
          for (int i = 0; i < kLanes; ++i)
            for (int e = 0; e < kElements; ++e) line[e][i] = filters[i][at + e * a.stride_c] * factors[i];
          for (int i = 0; i < kLanes; ++i)
            for (int e = 0; e < kElements; ++e) from_float(line[e][i], out++);
        }
      }
    }
  }
}
void pack_range(const PackStridedArgs& a, const float* fold, Range vectors) {
  grouped_pairs(a.shape, a.dtype) ? pack_vectors<Bf16Word>(a, fold, vectors) : pack_vectors<float>(a, fold, vectors);
}

void pack(const ConvShape& s, DType t, void* packed, const float* w, const float* fold, int threads) {
  const int64_t per_group = s.C / s.groups, taps = s.R * s.S, filter = per_group * taps;
  const PackStridedArgs a{s, t, 0, packed, w, filter, taps, s.S, 1, threads, per_group * filter};
  parallel(threads, [&](const Team& team) { pack_range(a, fold, team.share(ceil_div(s.K, int64_t(kLanes)))); });
}

size_t scratch_bytes(const ConvShape& s, DType t, const ConvConfig& c, int threads) {
  return plan_of(s, t, c).buffer_bytes * size_t(threads);
}

template <class T, class Word>
class Run {
 public:
  Run(const ConvArgs& args, const Team& team)
      : a_(args), s_(args.shape), p_(plan_of(args.shape, args.dtype, args.config)) {
    rows_ = reinterpret_cast<Word*>(static_cast<char*>(a_.scratch) + p_.buffer_bytes * size_t(team.rank));
    const int64_t blocks = ceil_div(s_.P, p_.block_rows);
    team.each(s_.N * blocks * p_.vectors, [&](int64_t i) {
      const int64_t vector = i % p_.vectors, block = i / p_.vectors % blocks, n = i / p_.vectors / blocks;
      const Range out = {block * p_.block_rows, smaller((block + 1) * p_.block_rows, s_.P)};
      channels_ = int(smaller(s_.C - vector * kLanes, int64_t(kLanes)));
      copy_rows(n, out, vector * kLanes);
      compute(n, out, vector);
    });
  }

 private:
  void copy_rows(int64_t n, Range out, int64_t c) {
    const T* x = static_cast<const T*>(a_.x) + c;
    const int64_t first = out.begin * s_.stride_h - s_.pad_h;
    const int64_t last = (out.end - 1) * s_.stride_h - s_.pad_h + (s_.R - 1) * s_.dilation_h;
    Word* to = rows_;
    for (int64_t h = first; h <= last; ++h, to += p_.row_words) {
      const bool inside = h >= 0 && h < s_.H;  // else a row of no pixels
      copy_columns(to, x + (n * s_.H + (inside ? h : 0)) * s_.W * s_.C, inside ? s_.W : 0, s_.C, -s_.pad_w, p_.columns,
                   channels_);
    }
  }

  void compute(int64_t n, Range out, int64_t vector) {
    const int64_t words = packed_bytes(s_, a_.dtype) / p_.vectors / sizeof(Word), k = vector * kLanes;
    const Word* w = static_cast<const Word*>(a_.packed) + vector * words;
    constexpr int64_t kPixel = kPixelWords<Word>;
    const TileRow<Word> tiles(
        {s_.R, s_.S, int(p_.per_group), s_.stride_w * kPixel, s_.dilation_w * kPixel, s_.dilation_h * p_.row_words},
        s_.Q);
    const Vec scale = a_.scale ? load_n(a_.scale + k, channels_) : broadcast(1.f);
    const Vec shift = a_.shift ? load_n(a_.shift + k, channels_) : zero();
    for (int64_t p = out.begin; p < out.end; ++p) {
      const int64_t row = ((n * s_.P + p) * s_.Q) * s_.K + k;
      tiles.run(rows_ + (p - out.begin) * s_.stride_h * p_.row_words, w,
                [&](const float* sums, int64_t q, int64_t count) {
                  finish_pixels(sums, count, row + q * s_.K, scale, shift);
                });
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
  Word* rows_;
  int channels_ = kLanes;
};

void run(const ConvArgs& a, const Team& team) {
  if (a.dtype == DType::f32) {
    Run<float, float>(a, team);
  } else if (grouped_pairs(a.shape, a.dtype)) {
    Run<bf16, Bf16Word>(a, team);
  } else {
    Run<bf16, float>(a, team);
  }
}

}  // namespace

void pack_grouped(const PackStridedArgs& a, const Team& team) {
  pack_range(a, nullptr, team.share(ceil_div(a.shape.K, int64_t(kLanes))));
}

extern const Algorithm kGrouped;
const Algorithm kGrouped = {"grouped", 1, 1, why_not, defaults, packed_bytes, pack, scratch_bytes, run};

}  // namespace RF_ISA
}  // namespace rf
