// Large output buffers of operators, reused between calls: a fresh page costs a fault, and a training step of ResNet-50
// at batch 16 touches gigabytes of them (a 51 MB tensor: 15 ms to fault in and 4 to give back, 2.4 to write; malloc
// maps whatever is 32 MB or more anew each time). Memory comes from mmap on huge pages and is kept when its tensor
// dies, to be cut and joined as later tensors want it. What is in use and kept together exceeds what was in use at once
// by little (keep_spare), so it costs memory only while something else grows: the weight gradients, which backward
// makes while the activations go, are therefore buffers too. Without the spare what is free is in pieces too small when
// most is in use, and is given back and mapped anew: 65 to 235 MB a step of ResNet-18 and -50 at batch 16, 1.07
// and 1.02 times their time. Keeping an eighth only was tried: ResNet-18 at batch 16 faults 400 MB a step, 980 ms for
// 670.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rf {

// At least `bytes` bytes, page-aligned, contents undefined. Throws std::bad_alloc. Any thread; no GIL needed.
void* take_buffer(size_t bytes);
void give_buffer(void* data);
// Unmaps what is kept and not in use; returns how many bytes that were.
size_t release_buffers();
size_t buffers_in_use();
// Whether a sixteenth of what was in use at once, 24 MB at most, may be kept beside it (at first: yes).
void keep_spare(bool spare);

}  // namespace rf
