// fold_patches on the CPU.
#include <algorithm>
#include <type_traits>

#include "layout.h"

namespace emr::cpu {
namespace {

struct Fold {
  int64_t samples, height, width, channels;          // of the images
  int64_t down, across, kernel_height, kernel_width;  // of the patches
  int64_t stride_height, stride_width, pad_height, pad_width;
};

// Adds the lines of a row of patches that land on one line of an image. Column by column of the kernel, so that one
// addition does not wait for the one before: patches beside each other overlap.
template <class T, int64_t kChannels>
void add_line(const Fold& f, const T* patches, compute_t<T>* sums) {
  const int64_t channels = kChannels > 0 ? kChannels : f.channels;
  const int64_t patch = f.kernel_height * f.kernel_width * channels, step = f.stride_width * channels;
  for (int64_t kx = 0; kx < f.kernel_width; ++kx) {
    const int64_t before = f.pad_width - kx, room = f.width - 1 + before;
    const int64_t first = before > 0 ? (before + f.stride_width - 1) / f.stride_width : 0;
    const int64_t last = room < 0 ? 0 : std::min(f.across, room / f.stride_width + 1);
    const T* source = patches + first * patch + kx * channels;
    compute_t<T>* target = sums + (first * f.stride_width - before) * channels;
    for (int64_t ox = first; ox < last; ++ox, source += patch, target += step) {
      for (int64_t c = 0; c < channels; ++c) {
        target[c] += widened(source[c]);
      }
    }
  }
}

template <class T>
auto line_of(int64_t channels) {
  switch (channels) {
    case 1:
      return add_line<T, 1>;
    case 2:
      return add_line<T, 2>;
    case 3:
      return add_line<T, 3>;
    case 4:
      return add_line<T, 4>;
    case 8:
      return add_line<T, 8>;
    default:
      return add_line<T, 0>;
  }
}

template <class T>
void fold(const Fold& f, const T* patches, T* images) {
  using A = compute_t<T>;
  constexpr bool in_place = std::is_same_v<T, A>;
  const int64_t line = f.width * f.channels, run = f.kernel_width * f.channels;
  const int64_t row = f.across * f.kernel_height * run;
  const auto add = line_of<T>(f.channels);
  const int64_t grain = 1 + kBlock / std::max<int64_t>(1, line * f.kernel_height);
  torch::stable::parallel_for(0, f.samples * f.height, grain, [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(in_place ? 0 : line);
    for (int64_t i = begin; i < end; ++i) {
      T* const out = images + i * line;
      A* sums = scratch.get();
      if constexpr (in_place) {
        sums = out;
      }
      std::fill_n(sums, line, A(0));
      const int64_t sample = i / f.height, y = i % f.height + f.pad_height;
      for (int64_t ky = y % f.stride_height; ky < f.kernel_height && ky <= y; ky += f.stride_height) {
        const int64_t oy = (y - ky) / f.stride_height;
        if (oy < f.down) {
          add(f, patches + (sample * f.down + oy) * row + ky * run, sums);
        }
      }
      if constexpr (!in_place) {
        for (int64_t j = 0; j < line; ++j) {
          out[j] = narrowed<T>(sums[j]);
        }
      }
    }
  });
}

}  // namespace

void fold_patches(
    const Tensor& images, const Tensor& patches, int64_t stride_height, int64_t stride_width, int64_t pad_height,
    int64_t pad_width) {
  STD_TORCH_CHECK(
      images.dim() == 4 && images.is_contiguous() && patches.dim() == 6 && patches.is_contiguous() &&
          patches.size(0) == images.size(0) && patches.size(5) == images.size(3) &&
          patches.scalar_type() == images.scalar_type(),
      "expected row-major images [N, H, W, C] and patches [N, OH, OW, KH, KW, C] of one dtype");
  STD_TORCH_CHECK(
      stride_height > 0 && stride_width > 0 && pad_height >= 0 && pad_width >= 0,
      "expected positive strides and no negative padding");
  const Fold f{images.size(0),  images.size(1),  images.size(2), images.size(3), patches.size(1), patches.size(2),
               patches.size(3), patches.size(4), stride_height,  stride_width,   pad_height,      pad_width};
  const void* const source = patches.const_data_ptr();
  void* const target = images.mutable_data_ptr();
  switch (dtype_of(images)) {
    case Dtype::f32:
      fold(f, static_cast<const float*>(source), static_cast<float*>(target));
      break;
    case Dtype::f64:
      fold(f, static_cast<const double*>(source), static_cast<double*>(target));
      break;
    case Dtype::bf16:
      fold(f, static_cast<const bf16*>(source), static_cast<bf16*>(target));
      break;
    case Dtype::fp16:
      fold(f, static_cast<const fp16*>(source), static_cast<fp16*>(target));
      break;
  }
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("fold_patches", TORCH_BOX(&emr::cpu::fold_patches));
}
