// Frozen (inference-only) networks on the CPU.
//
// Network   the graph: values are ints in the order they were made, weights are copied in; sizes stay open.
// Plan      the graph for one batch, image size and thread count: an algorithm per convolution, images per pass, an
//           arena in which values that do not live together share memory. run() is one parallel region, allocates
//           nothing after its first call and may be called from several threads at once: each call takes an arena.
//
// Every value is NHWC in the network's dtype; arithmetic is fp32. What cannot be done throws std::invalid_argument.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/program.h"

namespace rf {

enum class Op { input, conv, linear, max_pool, avg_pool, global_avg_pool, scale, add, relu, sigmoid };
const char* op_name(Op);

struct Pair {
  int64_t h, w;
};

// One value and the operator that makes it.
struct Node {
  Op op = Op::input;
  int x = -1, gate = -1, residual = -1;
  bool relu = false;
  int64_t channels = 0;  // of y
  // conv and linear (a 1x1 convolution of a 1x1 map)
  int64_t groups = 1;
  Pair kernel{1, 1}, stride{1, 1}, padding{0, 0}, dilation{1, 1};  // the pools use the first three
  std::vector<float> weight, fold, shift;                          // [K, C/groups, R, S], [K] or empty, [K] or empty
  bool ceil_mode = false, count_include_pad = true;
};

// Memory for weights and arenas: 64-byte aligned, huge pages asked for when large.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_;
  size_t bytes_;
};

// What a plan may be told, or tells, about one value. "": left to the heuristic.
struct Choice {
  std::string algorithm;
  int block_rows = 0, block_cols = 0, split_cols = 0;
  int64_t images = 0;  // per pass; 0: left to the heuristic
};
using Choices = std::map<int, Choice>;

class Plan;
bool is_inexact(int algorithm);  // adds up other products than the sum asked for: Winograd, Strassen
bool is_by_rows(int algorithm);  // can compute the rows of a max_pool, a band at a time
void tune_plan(Plan&, const Choices& given, int effort);

class Network : public std::enable_shared_from_this<Network> {
 public:
  explicit Network(DType dtype);

  int input(int64_t channels);
  // relu(conv(x, weight * fold) + shift + residual); fold (often BatchNorm's gamma / std) and shift: [K] or null.
  int conv(int x, int64_t filters, Pair kernel, Pair stride, Pair padding, Pair dilation, int64_t groups,
           const float* weight, const float* fold, const float* shift, int residual, bool relu);
  int linear(int x, int64_t out_features, const float* weight, const float* bias, bool relu);  // x is 1x1
  int max_pool(int x, Pair kernel, Pair stride, Pair padding, bool ceil_mode);
  int avg_pool(int x, Pair kernel, Pair stride, Pair padding, bool ceil_mode, bool count_include_pad);
  int global_avg_pool(int x);
  int scale(int x, int gate, int residual, bool relu);  // relu(x * gate + residual); gate is [N, C, 1, 1]
  int add(int x, int residual, bool relu);
  int relu(int x);
  int sigmoid(int x);
  void output(int x);

  // exact: no Winograd, no Strassen. tune: 0 the heuristics, 1 a short search by measurement, 2 a longer one.
  std::shared_ptr<Plan> plan(int64_t N, int64_t H, int64_t W, int threads, bool exact, int tune,
                             const Choices& choices);

  DType dtype() const { return dtype_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  int output() const { return output_; }
  // Packed weights that plans hold now, in bytes (shared between plans), and the copied originals'.
  size_t packed_bytes() const;
  size_t weight_bytes() const;

  // The node's weights in an algorithm's layout, packed at the first asking. `shape`: any size of this node.
  std::shared_ptr<const char> packed(int node, int algorithm, const ConvShape& shape, int threads);

 private:
  int append(Node node);
  void check_value(const char* what, int id) const;
  void check_open() const;

  struct Packed {
    std::weak_ptr<const char> memory;
    size_t bytes = 0;
  };
  const DType dtype_;
  std::vector<Node> nodes_;
  int output_ = -1;
  bool planned_ = false;
  mutable std::mutex mutex_;
  std::map<std::pair<int, int>, Packed> packed_;
};

// A value's size in one plan.
struct Extent {
  int64_t H = 0, W = 0, C = 0;
  int64_t elements() const { return H * W * C; }
};

class Plan {
 public:
  Plan(std::shared_ptr<Network> network, int64_t N, int64_t H, int64_t W, int threads, bool exact);

  // x: the input's images, NCHW or NHWC, either dtype; out: NHWC in the network's dtype. ms: null, or a float per
  // value to which each step's milliseconds are added (with a barrier after every step).
  void run(const void* x, bool nchw, DType x_dtype, void* out, double* ms = nullptr);

  // Measures the steps of `repeats` runs; describe() then reports the medians and the least.
  void profile(const void* x, bool nchw, DType x_dtype, void* out, int repeats);
  // Fills the free arenas with NaN: a test's proof that no step reads what none wrote.
  void poison();

  struct Row {
    int node;
    std::string op, algorithm;
    Extent in, out;
    ConvConfig config;
    Pair kernel, stride;
    int64_t groups;
    int64_t images;   // per pass
    double flops;     // of the whole batch: two per multiply-add of the plain algorithm
    double ms;        // of the whole batch, the median of the profiled runs; negative: never profiled
    double least_ms;  // the least: what a busy machine adds is left out
    bool fused;       // computed inside the next step
  };
  std::vector<Row> describe() const;
  Choices choices() const;
  size_t arena_bytes() const { return arena_bytes_; }  // of one call; calls at the same time hold one each
  Extent output_extent() const { return extents_[network_->output()]; }
  int64_t N() const { return N_; }
  int64_t H() const { return extents_[0].H; }
  int64_t W() const { return extents_[0].W; }
  int64_t C() const { return extents_[0].C; }
  int threads() const { return threads_; }
  DType dtype() const { return network_->dtype(); }

 private:
  friend class Network;
  friend class Tuner;

  struct Level {  // consecutive values computed `images` at a time, inside one pass of the next level
    int first, last;
    int64_t images;
  };
  // How the input is read: where the caller has it (NHWC; or NCHW, by kernels that take it), or through a layout step.
  enum class Input : int { nhwc, planar, converted, count };

  // Graph facts, once
  void infer_extents(int64_t H, int64_t W);
  void find_uses();
  void choose_images();
  void choose_convolutions(const Choices& choices);
  bool reads_planar() const;
  void find_levels();
  // Memory and steps from the choices: called again after every change of them.
  void build();
  void drop_arenas();
  void find_groups();
  void place_values();
  void emit(std::vector<Step>& steps, int level, int64_t begin, int64_t end, Input input) const;
  Step step_of(int node, int64_t begin, int64_t end, Input input) const;
  ConvShape shape_of(int node, int64_t images) const;
  ConvShape planned_shape(int node) const;              // of one pass
  ConvShape band_shape(int pool, int64_t* band) const;  // of the convolution fused into a max_pool
  int64_t scratch_bytes(int node) const;
  int64_t value_bytes(int node) const { return extents_[node].elements() * int64_t(dtype_size(network_->dtype())); }
  double flops_of(int node) const;
  Place place_of(int value, int64_t image, Input input) const;

  std::shared_ptr<Network> network_;
  const int64_t N_;
  const int threads_;
  const bool exact_;
  std::vector<Extent> extents_;
  std::vector<bool> live_;
  std::vector<std::vector<int>> readers_;
  std::vector<int> fused_into_;  // a convolution computed inside this max_pool, or -1
  std::vector<int64_t> images_;  // per value
  std::vector<ConvConfig> configs_;
  std::vector<std::shared_ptr<const char>> packed_;
  std::vector<Level> levels_;
  std::vector<int> level_;  // of the value's step
  std::vector<int> store_;  // the level whose pass the value's memory covers; levels_.size(): the whole batch
  std::vector<int> group_;  // values of one group are computed without a barrier between them
  std::vector<int64_t> offset_, scratch_;  // in the arena
  std::vector<double> ms_, least_ms_;
  std::vector<Step> steps_[int(Input::count)];
  bool planar_ = false;
  size_t arena_bytes_ = 0;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffer>> arenas_;  // not in use now
};

}  // namespace rf
