// The graph of a frozen network: values, their weights, and the packed weights that plans share.
#include "network.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <new>

#include "check.h"
#include "cpu/kernels.h"

namespace rf {

const char* op_name(Op op) {
  static const char* const kNames[] = {"input",           "conv",  "linear", "max_pool", "avg_pool",
                                       "global_avg_pool", "scale", "add",    "relu",     "sigmoid"};
  return kNames[int(op)];
}

// ---- Buffer

constexpr size_t kHugePage = size_t(2) << 20;

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  const size_t align = bytes >= kHugePage ? kHugePage : 64;
  const size_t rounded = (bytes + align - 1) / align * align;
  data_ = static_cast<char*>(::aligned_alloc(align, rounded ? rounded : align));
  if (!data_) throw std::bad_alloc();
#ifdef __linux__
  if (align == kHugePage) ::madvise(data_, rounded, MADV_HUGEPAGE);  // a wish: refused, all still works
#endif
}

Buffer::~Buffer() { ::free(data_); }

// ---- Network

Network::Network(DType dtype) : dtype_(dtype) {
  RF_CHECK(dtype == DType::f32 || dtype == DType::bf16, "Network: dtype is 0 (float32) or 1 (bfloat16), got ",
           int(dtype));
}

void Network::check_open() const { RF_CHECK(!planned_, "Network: a plan was made; the graph can no longer change"); }

void Network::check_value(const char* what, int id) const {
  RF_CHECK(id >= 0 && id < int(nodes_.size()), what, ": no value ", id, "; there are ", nodes_.size());
}

static void check_pair(const char* what, Pair p, int64_t least) {
  RF_CHECK(p.h >= least && p.w >= least && p.h < (1 << 20) && p.w < (1 << 20), what, ": wanted two sizes of at least ",
           least, ", got (", p.h, ", ", p.w, ")");
}

int Network::append(Node node) {
  check_open();
  nodes_.push_back(std::move(node));
  return int(nodes_.size()) - 1;
}

int Network::input(int64_t channels) {
  RF_CHECK(nodes_.empty(), "input: a network has one input, made first");
  RF_CHECK(channels > 0, "input: wanted at least one channel, got ", channels);
  Node n;
  n.op = Op::input;
  n.channels = channels;
  return append(std::move(n));
}

int Network::conv(int x, int64_t filters, Pair kernel, Pair stride, Pair padding, Pair dilation, int64_t groups,
                  const float* weight, const float* fold, const float* shift, int residual, bool relu) {
  check_value("conv: x", x);
  const int64_t C = nodes_[x].channels;
  check_pair("conv: kernel", kernel, 1);
  check_pair("conv: stride", stride, 1);
  check_pair("conv: padding", padding, 0);
  check_pair("conv: dilation", dilation, 1);
  RF_CHECK(filters > 0, "conv: wanted at least one filter, got ", filters);
  RF_CHECK(groups > 0 && C % groups == 0 && filters % groups == 0, "conv: groups must divide the channels (", C,
           ") and the filters (", filters, "), got ", groups);
  RF_CHECK(weight, "conv: weight is null");
  if (residual >= 0) {
    check_value("conv: residual", residual);
    RF_CHECK(nodes_[residual].channels == filters, "conv: the residual has ", nodes_[residual].channels,
             " channels, the output ", filters);
  }
  Node n;
  n.op = Op::conv;
  n.x = x;
  n.residual = residual < 0 ? -1 : residual;
  n.relu = relu;
  n.channels = filters;
  n.groups = groups;
  n.kernel = kernel;
  n.stride = stride;
  n.padding = padding;
  n.dilation = dilation;
  n.weight.assign(weight, weight + filters * (C / groups) * kernel.h * kernel.w);
  if (fold) n.fold.assign(fold, fold + filters);
  if (shift) n.shift.assign(shift, shift + filters);
  return append(std::move(n));
}

int Network::linear(int x, int64_t out_features, const float* weight, const float* bias, bool relu) {
  const int y = conv(x, out_features, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, weight, nullptr, bias, -1, relu);
  nodes_[y].op = Op::linear;
  return y;
}

int Network::max_pool(int x, Pair kernel, Pair stride, Pair padding, bool ceil_mode) {
  check_value("max_pool: x", x);
  check_pair("max_pool: kernel", kernel, 1);
  check_pair("max_pool: stride", stride, 1);
  check_pair("max_pool: padding", padding, 0);
  RF_CHECK(padding.h * 2 <= kernel.h && padding.w * 2 <= kernel.w,
           "max_pool: padding may be at most half the kernel, got (", padding.h, ", ", padding.w, ") for (", kernel.h,
           ", ", kernel.w, ")");
  Node n;
  n.op = Op::max_pool;
  n.x = x;
  n.channels = nodes_[x].channels;
  n.kernel = kernel;
  n.stride = stride;
  n.padding = padding;
  n.ceil_mode = ceil_mode;
  return append(std::move(n));
}

int Network::avg_pool(int x, Pair kernel, Pair stride, Pair padding, bool ceil_mode, bool count_include_pad) {
  const int y = max_pool(x, kernel, stride, padding, ceil_mode);
  nodes_[y].op = Op::avg_pool;
  nodes_[y].count_include_pad = count_include_pad;
  return y;
}

int Network::global_avg_pool(int x) {
  check_value("global_avg_pool: x", x);
  Node n;
  n.op = Op::global_avg_pool;
  n.x = x;
  n.channels = nodes_[x].channels;
  return append(std::move(n));
}

int Network::scale(int x, int gate, int residual, bool relu) {
  check_value("scale: x", x);
  check_value("scale: gate", gate);
  const int64_t C = nodes_[x].channels;
  RF_CHECK(nodes_[gate].channels == C, "scale: the gate has ", nodes_[gate].channels, " channels, x ", C);
  if (residual >= 0) {
    check_value("scale: residual", residual);
    RF_CHECK(nodes_[residual].channels == C, "scale: the residual has ", nodes_[residual].channels, " channels, x ", C);
  }
  Node n;
  n.op = Op::scale;
  n.x = x;
  n.gate = gate;
  n.residual = residual < 0 ? -1 : residual;
  n.relu = relu;
  n.channels = C;
  return append(std::move(n));
}

int Network::add(int x, int residual, bool relu) {
  check_value("add: x", x);
  check_value("add: residual", residual);
  RF_CHECK(nodes_[x].channels == nodes_[residual].channels, "add: x has ", nodes_[x].channels,
           " channels, the residual ", nodes_[residual].channels);
  Node n;
  n.op = Op::add;
  n.x = x;
  n.residual = residual;
  n.relu = relu;
  n.channels = nodes_[x].channels;
  return append(std::move(n));
}

int Network::relu(int x) {
  check_value("relu: x", x);
  Node n;
  n.op = Op::relu;
  n.x = x;
  n.relu = true;
  n.channels = nodes_[x].channels;
  return append(std::move(n));
}

int Network::sigmoid(int x) {
  const int y = relu(x);
  nodes_[y].op = Op::sigmoid;
  nodes_[y].relu = false;
  return y;
}

void Network::output(int x) {
  check_open();
  check_value("output", x);
  RF_CHECK(output_ < 0, "output: a network has one output, already value ", output_);
  RF_CHECK(nodes_[x].op != Op::input, "output: the input itself is no network");
  output_ = x;
}

// ---- weights

size_t Network::packed_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t total = 0;
  for (const auto& entry : packed_) total += entry.second.memory.expired() ? 0 : entry.second.bytes;
  return total;
}

size_t Network::weight_bytes() const {
  size_t total = 0;
  for (const Node& n : nodes_) total += (n.weight.size() + n.fold.size() + n.shift.size()) * sizeof(float);
  return total;
}

std::shared_ptr<const char> Network::packed(int node, int algorithm, const ConvShape& shape, int threads) {
  std::lock_guard<std::mutex> lock(mutex_);
  Packed& entry = packed_[{node, algorithm}];
  if (auto held = entry.memory.lock()) return held;
  const Node& n = nodes_[node];
  const ConvKernels& conv = *kernels().conv;
  auto buffer = std::make_shared<Buffer>(conv.packed_bytes(shape, dtype_, algorithm));
  conv.pack(shape, dtype_, algorithm, buffer->data(), n.weight.data(), n.fold.empty() ? nullptr : n.fold.data(),
            threads);
  std::shared_ptr<const char> memory(buffer, buffer->data());
  entry = {memory, buffer->bytes()};
  return memory;
}

}  // namespace rf
