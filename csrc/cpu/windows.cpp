// read_windows and write_windows on the CPU.
#include <cstring>

#include "layout.h"

namespace emr::cpu {
namespace {

// Windows of images [N, H, W, C], all of one size, as runs of bytes.
class Windows {
 public:
  Windows(
      const Tensor& images, const Tensor& rows, const Tensor& top, const Tensor& left, int64_t height, int64_t width)
      : count_(rows.numel()), height_(height) {
    STD_TORCH_CHECK(images.dim() == 4 && images.is_contiguous(), "expected row-major images [N, H, W, C]");
    const int64_t number = images.size(0), down = images.size(1), across = images.size(2);
    rows_ = indices(rows, number, "rows");
    top_ = indices(top, down - height + 1, "top");
    left_ = indices(left, across - width + 1, "left");
    pixel_ = images.size(3) * static_cast<int64_t>(images.element_size());
    line_ = across * pixel_;
    image_ = down * line_;
    run_ = width * pixel_;
  }

  // Calls f(window, offset in the images, offset in the windows, bytes) for each line of each window, in parallel.
  template <class F>
  void over_lines(const F& f) const {
    const int64_t grain = 1 + 2 * kBlock / std::max<int64_t>(1, height_ * run_);
    torch::stable::parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t corner = rows_[i] * image_ + top_[i] * line_ + left_[i] * pixel_;
        for (int64_t line = 0; line < height_; ++line) {
          f(i, corner + line * line_, (i * height_ + line) * run_, static_cast<size_t>(run_));
        }
      }
    });
  }

 private:
  const int64_t* indices(const Tensor& vector, int64_t extent, const char* name) const {
    STD_TORCH_CHECK(
        vector.scalar_type() == ScalarType::Long && vector.is_contiguous() && vector.numel() == count_,
        "expected one contiguous int64 for each window");
    const auto* const values = static_cast<const int64_t*>(vector.const_data_ptr());
    const bool inside = std::all_of(values, values + count_, [=](int64_t v) { return v >= 0 && v < extent; });
    STD_TORCH_CHECK(
        inside, name, " holds numbers outside [0, ", extent, "); expected windows inside of the images");
    return values;
  }

  int64_t count_, height_, pixel_, line_, image_, run_;
  const int64_t *rows_, *top_, *left_;
};

}  // namespace

Tensor read_windows(
    const Tensor& images, const Tensor& rows, const Tensor& top, const Tensor& left, int64_t height, int64_t width) {
  const Windows windows(images, rows, top, left, height, width);
  Tensor result = torch::stable::new_empty(images, {rows.numel(), height, width, images.size(3)});
  const auto* const source = static_cast<const char*>(images.const_data_ptr());
  auto* const target = static_cast<char*>(result.mutable_data_ptr());
  windows.over_lines([=](int64_t, int64_t at, int64_t to, size_t bytes) {
    std::memcpy(target + to, source + at, bytes);
  });
  return result;
}

void write_windows(
    const Tensor& images, const Tensor& rows, const Tensor& top, const Tensor& left, const Tensor& patches,
    const OptionalTensor& chosen) {
  STD_TORCH_CHECK(
      patches.dim() == 4 && patches.is_contiguous() && patches.size(0) == rows.numel() &&
          patches.size(3) == images.size(3) && patches.scalar_type() == images.scalar_type(),
      "expected row-major windows [m, height, width, C] like the images");
  const Windows windows(images, rows, top, left, patches.size(1), patches.size(2));
  const uint8_t* wanted = nullptr;
  if (chosen.has_value()) {
    STD_TORCH_CHECK(
        chosen->scalar_type() == ScalarType::Bool && chosen->is_contiguous() && chosen->numel() == rows.numel(),
        "expected one contiguous bool for each window");
    wanted = static_cast<const uint8_t*>(chosen->const_data_ptr());
  }
  const auto* const source = static_cast<const char*>(patches.const_data_ptr());
  auto* const target = static_cast<char*>(images.mutable_data_ptr());
  windows.over_lines([=](int64_t i, int64_t at, int64_t from, size_t bytes) {
    if (wanted == nullptr || wanted[i] != 0) {
      std::memcpy(target + at, source + from, bytes);
    }
  });
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("read_windows", TORCH_BOX(&emr::cpu::read_windows));
  m.impl("write_windows", TORCH_BOX(&emr::cpu::write_windows));
}
