// How a dense [rows, channels] matrix (N*H*W rows of an NHWC tensor) is cut into blocks: host arithmetic, no CUDA.
//
// A block of 256 threads is `width` packs wide and 256 / width rows high, and walks one chunk of rows. Neighbouring
// blocks are neighbours in channels, so that together they stream whole rows. Chunks are as many as fill the card once:
// then each is walked by one block, and a second kernel of the same cut meets the rows the first one read last in L2.
#pragma once
#include <cstdint>

namespace rf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxWidth = 32;          // packs; one warp's row of 512 bytes
constexpr int kMaxColumns = kThreads;  // channels of a block: 32 packs of 8, so one thread each in merges
constexpr int kLeastRows = 2;          // per thread, before another block is worth its merge
static_assert(kMaxWidth * 8 <= kMaxColumns, "merges give every channel of a block its own thread");
static_assert(kThreads == 1 << 8, "rows of a block are counted with shifts");

struct Tiles {
  int64_t rows;
  int64_t chunk_rows;
  int channels;
  int packs;  // channels / V
  int log_width;
  int channel_tiles;
  int chunks;

  int blocks() const { return channel_tiles * chunks; }
};

// `blocks` is how many the card runs at once; the answer never has more chunks than that allows.
inline Tiles make_tiles(int64_t rows, int channels, int vec, int blocks) {
  Tiles t{};
  t.rows = rows;
  t.channels = channels;
  t.packs = channels / vec;
  while ((1 << t.log_width) < t.packs && (1 << t.log_width) < kMaxWidth) ++t.log_width;
  const int width = 1 << t.log_width, height = kThreads / width;
  t.channel_tiles = (t.packs + width - 1) / width;
  int64_t chunks = blocks / t.channel_tiles;
  const int64_t most = rows / (int64_t(height) * kLeastRows);
  if (chunks > most) chunks = most;
  if (chunks < 1) chunks = 1;
  t.chunk_rows = (rows + chunks - 1) / chunks;
  t.chunks = int((rows + t.chunk_rows - 1) / t.chunk_rows);
  return t;
}

// Floats a two-stage reduction keeps between its kernels: two per chunk and channel, and one shift per channel.
inline int64_t workspace_floats(const Tiles& t) { return (2 * int64_t(t.chunks) + 1) * t.channels; }

}  // namespace rf::cuda
