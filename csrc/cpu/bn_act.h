// What bn_act's forward and backward share: the fixed chunks of rows every sum is cut into, how a team divides
// them, column loops with masked tails. The chunk grid depends on the number of rows alone, so
// neither the thread count nor timing can change a bit of any sum.
#pragma once
#include <cmath>
#include <type_traits>

#include "../bn_act.h"
#include "../workspace.h"
#include "parallel.h"
#include "simd.h"

namespace rf {
namespace RF_ISA {

constexpr int64_t kColumnGrain = 64;  // channels; a cut narrower than a cache line of bf16 shares lines
constexpr int kGroupRows = 4;         // short rows summed in registers before they meet an accumulator
constexpr size_t kShortRow = 256;     // bytes; longer rows are read one by one: zigzag over them halves DRAM's rate
constexpr int kMergeBlock = 16;       // channels whose partial sums are merged together: one line of floats
constexpr int64_t kThreadElements = 8192;   // a share below it is not worth a thread
constexpr size_t kStreamBytes = 24u << 20;  // outputs this large bypass the caches (measured, see bn_act.cpp)

RF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RF_INLINE int64_t round_up(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

// Few enough chunks that their partial sums stay in cache, few enough rows that float32 sums stay accurate: chunks'
// errors average out, so few chunks must be short ones (256 rows in chunks of 64: gradients that cancel had twice
// eager's error). Multiples of two of a convolution's tiles (gemm.h), which takes statistics chunk by chunk.
inline int64_t chunk_rows(int64_t rows) {
  const int64_t part = rows / 24 / 14 * 14, shortest = part < 14 ? 14 : least(part, 56), wanted = (rows + 127) / 128;
  return wanted <= shortest ? shortest : least(round_up(wanted, 28), 504);
}

struct Grid {
  int64_t rows, channels, step, chunks, padded;
  Grid(int64_t rows_, int64_t channels_)
      : rows(rows_),
        channels(channels_),
        step(chunk_rows(rows_)),
        chunks((rows_ + step - 1) / step),
        padded(round_up(channels_, kMergeBlock)) {}
  int64_t chunk_size(int64_t chunk) const { return least(step, rows - chunk * step); }
};

struct Tile {
  int64_t chunk, row_begin, row_end, col_begin, col_end;
};

// The team's tiles: chunks of rows, the first and last of a thread's share perhaps cut in columns.
// Backwards when `reverse`: a second pass then begins with what the first one left in the caches.
template <class Body>
inline void for_tiles(const Team& team, const Grid& grid, bool reverse, const Body& body) {
  const int64_t cuts = (grid.channels + kColumnGrain - 1) / kColumnGrain;
  const auto units_of = [&](int owner) { return team.share_of(owner, grid.chunks * cuts); };
  const auto chunks_of = [&](int owner) {
    const Range units = units_of(owner);
    return units.begin < units.end ? (units.end - 1) / cuts - units.begin / cuts + 1 : 0;
  };
  team.each_piece(chunks_of, [&](int owner, int64_t piece) {
    const Range units = units_of(owner);
    const int64_t first = units.begin / cuts, last = (units.end - 1) / cuts, i = first + piece;
    const int64_t chunk = reverse ? first + last - i : i;
    const int64_t cut_begin = chunk == first ? units.begin - first * cuts : 0;
    const int64_t cut_end = chunk == last ? units.end - last * cuts : cuts;
    body(Tile{chunk, chunk * grid.step, chunk * grid.step + grid.chunk_size(chunk), cut_begin * kColumnGrain,
              least(cut_end * kColumnGrain, grid.channels)});
  });
}

// Vectors of a row: whole ones, then a masked tail.
struct Whole {};
struct Part {
  int n;
};
template <class T>
RF_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
RF_INLINE Vec load(const T* p, Part part) {
  return load_n(p, part.n);
}
template <class T>
RF_INLINE void store(T* p, Vec v, Whole) {
  store(p, v);
}
template <class T>
RF_INLINE void store(T* p, Vec v, Part part) {
  store_n(p, v, part.n);
}
// An output large enough to bypass the caches has whole, aligned vectors only (can_stream).
template <bool streamed, class T, class Lanes>
RF_INLINE void put(T* p, Vec v, Lanes lanes) {
  store(p, v, lanes);
}
template <>
RF_INLINE void put<true>(float* p, Vec v, Whole) {
  stream(p, v);
}
template <>
RF_INLINE void put<true>(bf16* p, Vec v, Whole) {
  stream(p, v);
}

template <class Body>
RF_INLINE void for_columns(int64_t begin, int64_t end, const Body& body) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) body(c, Whole{});
  if (c < end) body(c, Part{int(end - c)});
}

// Calls body(first row, constant row count) over a tile's rows in groups.
template <class Body>
RF_INLINE void for_groups(const Tile& t, size_t row_bytes, const Body& body) {
  int64_t row = t.row_begin;
  if (row_bytes <= kShortRow)
    for (; row + kGroupRows <= t.row_end; row += kGroupRows) body(row, std::integral_constant<int, kGroupRows>{});
  for (; row < t.row_end; ++row) body(row, std::integral_constant<int, 1>{});
}

inline bool can_stream(const void* out, const Grid& grid, DType dtype) {
  const size_t row = size_t(grid.channels) * dtype_size(dtype);
  return size_t(grid.rows) * row >= kStreamBytes && row % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

inline int useful_threads(int threads, const Grid& grid) {
  const int64_t most = (grid.rows * grid.channels + kThreadElements - 1) / kThreadElements;
  return int(least(threads, most < 1 ? 1 : most));
}

// The constants of y = (x - mean) * scale + beta, padded to whole vectors so that no tail needs a mask on them.
// (x - mean) first: x * scale + shift cancels catastrophically where mean is large against the spread.
struct Affine {
  float *mean, *scale, *beta;
};

// Both directions compute rstd here: the ReLU's mask recomputed in backward must have the forward's signs.
inline float rstd_of(float var, double eps) { return float(1.0 / std::sqrt(double(var) + eps)); }

RF_INLINE Vec normalise(Vec x, const Affine& k, int64_t c) {
  return fma(x - load(k.mean + c), load(k.scale + c), load(k.beta + c));
}

}  // namespace RF_ISA
}  // namespace rf
