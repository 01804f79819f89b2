// draw_read and draw_write on the CPU: checks, allocation, the parallel loop. The arithmetic is in kernels/draw.h.
#include "../kernels/draw.h"

#include <numeric>

#include "rows.h"

namespace hk {
namespace {

// An image batch (B, C, height, width) and the size of its patches (B, C, size, size).
struct Sizes {
  int64_t batch, channels, height, width, size;
};

bool is_batch(const Tensor& t, const Tensor& attention) {
  return t.dim() == 4 && attention.dim() == 2 && attention.size(0) == t.size(0) && attention.size(1) == 5 &&
         attention.scalar_type() == t.scalar_type();
}

// The public functions make these tensors themselves, so a refusal needs no more words.
Sizes sizes_of_images(const Tensor& images, const Tensor& attention, int64_t size) {
  STD_TORCH_CHECK(is_batch(images, attention) && size >= 1 && images.size(2) >= 1 && images.size(3) >= 1,
                  "draw_read: shapes or dtypes do not fit");
  return {images.size(0), images.size(1), images.size(2), images.size(3), size};
}
Sizes sizes_of_patches(const Tensor& patch, const Tensor& attention, int64_t height, int64_t width) {
  STD_TORCH_CHECK(is_batch(patch, attention) && patch.size(2) == patch.size(3) && patch.size(2) >= 1 && height >= 1 &&
                      width >= 1,
                  "draw_write: shapes or dtypes do not fit");
  return {patch.size(0), patch.size(1), height, width, patch.size(2)};
}

// d_image, d_patch and d_attention: those that have elements are wanted.
template <class T>
void differentiate(const Sizes& s, bool writes, const Tensor& attention, const MaybeTensor& images,
                   const MaybeTensor& patches, const Tensor& d_image, const Tensor& d_patch,
                   const Tensor& d_attention) {
  const int64_t image = s.channels * s.height * s.width, patch = s.channels * s.size * s.size;
  T *to_image = written<T>(d_image), *to_patch = written<T>(d_patch), *to_attention = written<T>(d_attention);
  const T* numbers = static_cast<const T*>(attention.const_data_ptr());
  // The gradient by an image does not depend on it, nor that by a patch.
  const T* from = to_patch || to_attention ? data<T>(images) : nullptr;
  const T* of = to_image || to_attention ? data<T>(patches) : nullptr;
  const auto at = [](auto* p, int64_t offset) { return p ? p + offset : nullptr; };
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, image * s.size));
  Buffer<T> ramp(draw::whole(std::max(s.height, s.width)));
  std::iota(ramp.begin(), ramp.end(), T(0));
  torch::stable::parallel_for(0, s.batch, grain, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(draw::scratch_size<T>(s.height, s.width, s.size));
    for (int64_t i = begin; i < end; ++i)
      run(draw::Sample<T>{.channels = s.channels, .height = s.height, .width = s.width, .size = s.size,
                          .writes = writes, .attention = numbers + i * 5, .image = at(from, i * image),
                          .patch = at(of, i * patch), .ramp = ramp.data(), .scratch = scratch.data(),
                          .d_image = at(to_image, i * image), .d_patch = at(to_patch, i * patch),
                          .d_attention = at(to_attention, i * 5)});
  });
}

// ---- The operators ----

Tensor draw_read(Tensor images, Tensor attention, int64_t size) {
  const Sizes s = sizes_of_images(images, attention, size);
  const Tensor result = empty_of({s.batch, s.channels, size, size}, images), none = empty_of({0}, images);
  HK_DISPATCH("draw_read", images, differentiate, s, false, packed(attention), packed(images), std::nullopt, none,
              result, none);
  return result;
}

Tensor draw_write(Tensor patch, Tensor attention, int64_t height, int64_t width) {
  const Sizes s = sizes_of_patches(patch, attention, height, width);
  const Tensor result = empty_of({s.batch, s.channels, height, width}, patch), none = empty_of({0}, patch);
  HK_DISPATCH("draw_write", patch, differentiate, s, true, packed(attention), std::nullopt, packed(patch), result,
              none, none);
  return result;
}

std::tuple<Tensor, Tensor> draw_read_backward(Tensor grad, Tensor images, Tensor attention, int64_t needs) {
  STD_TORCH_CHECK(is_batch(grad, attention) && grad.size(1) == images.size(1) && grad.size(2) == grad.size(3),
                  "draw_read: shapes or dtypes do not fit");
  const Sizes s = sizes_of_images(images, attention, grad.size(2));
  const Tensor d_images = empty_for(images, needs & kNeedsState), none = empty_of({0}, images);
  const Tensor d_attention = empty_for(attention, needs & kNeedsParameters);
  HK_DISPATCH("draw_read", images, differentiate, s, false, packed(attention), packed(images), packed(grad), d_images,
              none, d_attention);
  return {d_images, d_attention};
}

std::tuple<Tensor, Tensor> draw_write_backward(Tensor grad, Tensor patch, Tensor attention, int64_t needs) {
  STD_TORCH_CHECK(is_batch(grad, attention) && grad.size(1) == patch.size(1), "draw_write: shapes or dtypes do not fit");
  const Sizes s = sizes_of_patches(patch, attention, grad.size(2), grad.size(3));
  const Tensor d_patch = empty_for(patch, needs & kNeedsState), none = empty_of({0}, patch);
  const Tensor d_attention = empty_for(attention, needs & kNeedsParameters);
  HK_DISPATCH("draw_write", patch, differentiate, s, true, packed(attention), packed(grad), packed(patch), none,
              d_patch, d_attention);
  return {d_patch, d_attention};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hvae_kernels, CPU, m) {
  m.impl("draw_read.cpp", TORCH_BOX(&draw_read));
  m.impl("draw_write.cpp", TORCH_BOX(&draw_write));
  m.impl("draw_read_backward.cpp", TORCH_BOX(&draw_read_backward));
  m.impl("draw_write_backward.cpp", TORCH_BOX(&draw_write_backward));
}

}  // namespace hk
