// A residual block in training, forward and backward in one call each.
// Bytes: those of its convolutions and norms; between links nothing but the convolutions' outputs is kept, the
// activation behind each is made again in backward for the weight gradient that wants it.
// The idea: a block is some 30 operators, and what an interpreter does between them finds no cache warm: on two cores
// it had 4.5 % of the samples of ResNet-50's step at batch 16 (perf), and its temporaries came and went as tensors of
// their own.
#include "residual_block.h"

#include <algorithm>

#include "buffers.h"
#include "check.h"
#include "cpu/kernels.h"

namespace rf {

namespace {

class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(bytes ? take_buffer(bytes) : nullptr) {}
  ~Buffer() {
    if (data_) give_buffer(data_);
  }
  Buffer(const Buffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

int64_t rows_of(const BlockLink& link) { return link.shape.N * link.shape.P * link.shape.Q; }
size_t output_bytes(const BlockLink& link, DType t) { return size_t(rows_of(link) * link.shape.K) * dtype_size(t); }
size_t input_bytes(const ConvShape& s, DType t) { return size_t(s.N * s.H * s.W * s.C) * dtype_size(t); }

// A 1x1 filter that leaves pixels out: a dense convolution of the others.
bool leaves_out(const ConvShape& s) {
  return s.R * s.S == 1 && s.groups == 1 && s.pad_h + s.pad_w == 0 && s.stride_h * s.stride_w > 1;
}
ConvShape among_its_pixels(const ConvShape& s) {
  ConvShape dense = s;
  dense.H = s.P, dense.W = s.Q;
  dense.stride_h = dense.stride_w = 1;
  return dense;
}

class Block {
 public:
  explicit Block(const ResidualBlock& block) : b_(block), k_(kernels()), last_(int(block.links.size()) - 1) {}

  void forward() const {
    size_t most = 0, sums = 0, constants = 0;
    for (int i = 0; i <= last_; ++i) {
      if (i < last_) most = std::max(most, output_bytes(b_.links[i], b_.dtype));
      sums = std::max(sums, moments_bytes(b_.links[i]));
      constants = std::max(constants, 2 * sizeof(float) * size_t(b_.links[i].shape.K));
    }
    if (projects()) sums = std::max(sums, moments_bytes(b_.projection[0]));
    const Buffer activation(most), moments(sums), vectors(constants);
    Before before = {b_.x, {}};
    for (int i = 0; i < last_; ++i) {
      const BlockLink &link = b_.links[i], &next = b_.links[i + 1];
      float* taken = convolve(link, before, moments.get());
      const bool whole = takes(next).norm;  // the next convolution normalises what it reads
      BnActArgs args = norm(link, whole ? nullptr : activation.get(), true);
      args.moments = taken;
      before = whole ? start_norm(args, vectors.get()) : Before{activation.get(), {}};
      k_.bn_act_forward(args);
      if (whole) finish_norm(link, vectors.get());
    }
    const Buffer unkept_shortcut(projects() ? unkept_bytes(b_.projection[0]) : 0);
    const Buffer unkept(unkept_bytes(b_.links[last_]));
    const BlockLink last = with_output(b_.links[last_], unkept.get());
    BnActArgs end = norm(last, b_.y, true);
    end.residual = b_.x;
    if (projects()) {
      const BlockLink p = with_output(b_.projection[0], unkept_shortcut.get());
      BnActArgs statistics = norm(p, nullptr, true);
      statistics.moments = convolve(p, {b_.x, {}}, moments.get());
      k_.bn_act_forward(statistics);
      end.residual = p.z;
      end.residual_norm = {p.mean, p.var, p.gamma, p.beta, p.eps};
    }
    end.moments = convolve(last, before, moments.get());
    k_.bn_act_forward(end);
  }

  // Temporaries lie where something else will: of a block's maps only dz has memory of its own, and g or the gradient.
  // A z that was not kept lies where its dz will.
  bool backward(const void* dy, void* dx) const {
    size_t outputs = 0, inputs = 0;
    for (const BlockLink& link : b_.links) outputs = std::max(outputs, output_bytes(link, b_.dtype));
    for (int i = 1; i <= last_; ++i) inputs = std::max(inputs, input_bytes(b_.links[i].shape, b_.dtype));
    const BlockLink& first = b_.links[0];
    const bool shortcut = projects() ? wants(b_.projection[0]) || dx : dx != nullptr;
    // Of an identity g, to which the first link's data gradient is added in place; else what lies between links.
    const bool onto = !projects() && is_convolution_of_dy(first.shape);
    const bool between = dx && !onto && inputs <= input_bytes(first.shape, b_.dtype);
    const size_t masked = output_bytes(b_.links[last_], b_.dtype);
    const Buffer own_g(shortcut && !onto ? masked : 0), dz(outputs), own_gradient(between ? 0 : inputs);
    void *const g = onto ? dx : own_g.get(), *const gradient = between ? dx : own_gradient.get();
    bool finite = true;
    const bool again = !b_.links[last_].z;
    if (again && last_ > 0) normalise(b_.links[last_ - 1], gradient, false);
    BnActBackwardArgs end =
        norm_backward(computed(b_.links[last_], last_ > 0 ? gradient : b_.x, dz.get()), dy, dz.get(), true);
    end.dresidual = g;
    end.y = b_.y;
    k_.bn_act_backward(end);
    for (int i = last_; i > 0; --i) {
      const BlockLink &link = b_.links[i], &before = b_.links[i - 1];
      if (link.dw) {  // what it multiplies lies where its gradient will
        if (i < last_ || !again) normalise(before, gradient, false);
        finite &= weight_gradient(link, link.shape, dz.get(), gradient);
      }
      if (!dx && !wants_up_to(i - 1)) break;
      data_gradient(link, link.shape, dz.get(), gradient, nullptr);
      k_.bn_act_backward(norm_backward(before, gradient, dz.get(), true));
    }
    if (first.dw) finite &= weight_gradient(first, first.shape, dz.get(), b_.x);
    if (dx) data_gradient(first, first.shape, dz.get(), dx, onto ? g : nullptr);
    if (projects() && shortcut) return projection_backward(g, dz.get(), dx) && finite;
    if (dx && !onto) add(first.shape, dx, g);
    return finite;
  }

 private:
  // What a convolution reads: a tensor, or z of the link before and its norm.
  struct Before {
    const void* x;
    ConvNorm norm;
  };

  bool projects() const { return !b_.projection.empty(); }
  ConvTakes takes(const BlockLink& link) const { return conv_takes(link.shape, b_.dtype, b_.exact, b_.threads); }
  size_t moments_bytes(const BlockLink& link) const {
    return takes(link).moments ? sizeof(float) * k_.bn_moments_size(rows_of(link), link.shape.K) : 0;
  }

  // Where a z that is not kept goes.
  size_t unkept_bytes(const BlockLink& link) const { return link.z ? 0 : output_bytes(link, b_.dtype); }
  static BlockLink with_output(BlockLink link, void* z) {
    if (!link.z) link.z = z;
    return link;
  }
  // The link with its z: the one kept, or computed again of `in` to `z`.
  BlockLink computed(const BlockLink& link, const void* in, void* z) const {
    const BlockLink whole = with_output(link, z);
    if (!link.z) convolve(whole, {in, {}}, nullptr);
    return whole;
  }

  // z of a link; its moments at `moments` where that is and the convolution takes them, else null.
  float* convolve(const BlockLink& link, const Before& before, void* moments) const {
    float* taken = moments && takes(link).moments ? static_cast<float*>(moments) : nullptr;
    conv_forward({link.shape, b_.dtype, link.z, before.x, link.filters, nullptr, nullptr, nullptr, false, b_.exact,
                  b_.threads, taken, before.norm});
    return taken;
  }

  // A norm the next convolution applies: its statistics now, its constants at `vectors` (K scales, K betas).
  Before start_norm(BnActArgs& args, void* vectors) const {
    float* scale = static_cast<float*>(vectors);
    args.rstd = scale;
    return {args.x, {args.mean, scale, scale + args.channels}};
  }
  static void finish_norm(const BlockLink& link, void* vectors) {
    float *scale = static_cast<float*>(vectors), *beta = scale + link.shape.K;
    for (int64_t c = 0; c < link.shape.K; ++c) {
      if (link.gamma) scale[c] = link.gamma[c] * scale[c];
      beta[c] = link.beta ? link.beta[c] : 0.f;
    }
  }
  BnActArgs norm(const BlockLink& link, void* y, bool training) const {
    return {b_.dtype,   y,         link.mean,     link.var,     nullptr,  link.z,   nullptr,
            link.gamma, link.beta, rows_of(link), link.shape.K, link.eps, training, true,
            b_.threads, {}};
  }
  void normalise(const BlockLink& link, void* y, bool training) const { k_.bn_act_forward(norm(link, y, training)); }
  BnActBackwardArgs norm_backward(const BlockLink& link, const void* dy, void* dx, bool relu) const {
    const int64_t rows = rows_of(link);
    return {b_.dtype,  dx,       link.dgamma, link.dbeta, nullptr,      dy,   link.z, nullptr, link.gamma, link.beta,
            link.mean, link.var, link.eps,    rows,       link.shape.K, rows, true,   relu,    false,      b_.threads};
  }
  bool weight_gradient(const BlockLink& link, const ConvShape& shape, const void* dz, const void* in) const {
    const auto& at = link.dw_strides;
    return conv_weight_gradient({shape, b_.dtype, link.dw, at[0], at[1], at[2], at[3], dz, in, b_.threads}, b_.exact);
  }
  void data_gradient(const BlockLink& link, const ConvShape& shape, const void* dz, void* dx, const void* onto) const {
    conv_data_gradient({shape, b_.dtype, dx, dz, link.filters, onto, b_.exact, b_.threads});
  }
  static bool is_convolution_of_dy(const ConvShape& s) { return !conv_data_gradient_why_not(s, DType::f32, true); }

  static bool wants(const BlockLink& link) { return link.dw || link.dgamma || link.dbeta; }
  bool wants_up_to(int i) const { return std::any_of(b_.links.begin(), b_.links.begin() + i + 1, wants); }

  // dx += of the shape's input.
  void add(const ConvShape& s, void* dx, void* other) const {
    ConvShape whole = s;
    whole.P = s.H, whole.Q = s.W;
    whole.stride_h = whole.stride_w = 1;
    k_.add_strided_pixels({whole, b_.dtype, dx, other, b_.threads});
  }

  // The gradients of the projection from g; dx, which has the main path's, grows by its own. `dz` is free by now.
  bool projection_backward(const void* g, void* dz, void* dx) const {
    const BlockLink& p = b_.projection[0];
    bool finite = true;
    k_.bn_act_backward(norm_backward(computed(p, b_.x, dz), g, dz, false));
    const bool few = leaves_out(p.shape), in_place = !few && is_convolution_of_dy(p.shape);
    const ConvShape shape = few ? among_its_pixels(p.shape) : p.shape;
    const Buffer input((few && p.dw) || (dx && !in_place) ? input_bytes(shape, b_.dtype) : 0);
    if (p.dw) {
      if (few) k_.gather_strided_pixels({p.shape, b_.dtype, const_cast<void*>(b_.x), input.get(), b_.threads});
      finite = weight_gradient(p, shape, dz, few ? input.get() : b_.x);
    }
    if (!dx) return finite;
    if (in_place) {
      data_gradient(p, p.shape, dz, dx, dx);
    } else {
      data_gradient(p, shape, dz, input.get(), nullptr);
      few ? k_.add_strided_pixels({p.shape, b_.dtype, dx, input.get(), b_.threads}) : add(p.shape, dx, input.get());
    }
    return finite;
  }

  const ResidualBlock& b_;
  const Kernels& k_;
  const int last_;
};

const char* link_why_not(const BlockLink& link, DType t) {
  const char* reason = conv_data_gradient_why_not(link.shape, t, false);
  return reason ? reason : kernels().wgrad_why_not(link.shape, t);
}

}  // namespace

void residual_block_forward(const ResidualBlock& block) { Block(block).forward(); }

bool residual_block_backward(const ResidualBlock& block, const void* dy, void* dx) {
  return Block(block).backward(dy, dx);
}

const char* residual_block_why_not(const ResidualBlock& block) {
  for (const std::vector<BlockLink>* path : {&block.links, &block.projection})
    for (const BlockLink& link : *path)
      if (const char* reason = link_why_not(link, block.dtype)) return reason;
  return nullptr;
}

}  // namespace rf
