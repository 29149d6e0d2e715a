// affine_relu, its vjp and its jvp on the CPU.
#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {
namespace {

template <class A>
void forward(
    const Tensor& a, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& skip,
    double negative_slope, const Tensor& out, const Tensor& bits) {
  if (a.numel() == 0) {
    return;
  }
  const Geometry g = geometry_of(a, scale.has_value() || shift.has_value());
  const Coefficients<A> scales(g, scale, A(1)), shifts(g, shift, A(0));
  const Forward task{
      g,
      a.const_data_ptr(),
      skip ? skip->const_data_ptr() : nullptr,
      out.mutable_data_ptr(),
      static_cast<uint8_t*>(bits.mutable_data_ptr()),
      scales.data(),
      shifts.data(),
      negative_slope};
  const Kernels& k = kernel_set().affine_relu(dtype_of(a));
  over_blocks(g.numel, [&](int64_t begin, int64_t end) { k.forward(task, begin, end); });
}

template <class A>
void backward(
    const Tensor& in, const Tensor& bits, const OptionalTensor& scale, const OptionalTensor& skip,
    double negative_slope, const Tensor& out) {
  if (in.numel() == 0) {
    return;
  }
  const Geometry g = geometry_of(in, scale.has_value());
  const Coefficients<A> scales(g, scale, A(1));
  const Backward task{
      g,
      in.const_data_ptr(),
      nullptr,
      skip ? skip->const_data_ptr() : nullptr,
      out.mutable_data_ptr(),
      static_cast<const uint8_t*>(bits.const_data_ptr()),
      scales.data(),
      negative_slope};
  const Kernels& k = kernel_set().affine_relu(dtype_of(in));
  over_blocks(g.numel, [&](int64_t begin, int64_t end) { k.backward(task, begin, end); });
}

// Rows: block b writes the sum of its piece of row r at r + b; each pair has a place of its own.
template <class A>
void sum_over_rows(const Backward& task, const Kernels& k, double* result) {
  const Geometry& g = task.geometry;
  const int64_t blocks = (g.numel + kBlock - 1) / kBlock;
  const int64_t rows = g.numel / g.row;
  std::vector<A> pieces(rows + blocks, A(0));
  torch::stable::parallel_for(0, blocks, 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kBlock, end = std::min(begin + kBlock, g.numel);
      k.backward_sums(task, begin, end, pieces.data() + begin / g.row + b);
    }
  });
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t last = ((r + 1) * g.row - 1) / kBlock;
    for (int64_t b = r * g.row / kBlock; b <= last; ++b) {
      result[r % g.channels] += pieces[r + b];
    }
  }
}

// Periods: a fixed number of parts, each with a table of sums.
template <class A>
void sum_over_periods(const Backward& task, const Kernels& k, double* result) {
  const Geometry& g = task.geometry;
  constexpr int64_t kMaxParts = 64;
  // A part is several tables long, so that clearing and adding tables stays a fraction of the work.
  const int64_t least = std::max<int64_t>(kBlock, 8 * g.period);
  const int64_t parts = std::clamp<int64_t>(g.numel / least, 1, kMaxParts);
  const int64_t size = ((g.numel + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
  std::vector<A> tables(parts * g.period, A(0));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t begin = std::min(p * size, g.numel), end = std::min(begin + size, g.numel);
      k.backward_sums(task, begin, end, tables.data() + p * g.period);
    }
  });
  for (int64_t p = 0; p < parts; ++p) {
    const A* table = tables.data() + p * g.period;
    for (int64_t i = 0, c = 0; i < g.period; c = c + 1 == g.channels ? 0 : c + 1) {
      for (const int64_t end = i + g.row; i < end; ++i) {
        result[c] += table[i];
      }
    }
  }
}

template <class A>
void backward_sums(
    const Tensor& in, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta,
    const Tensor& out, const Tensor& dscale) {
  if (in.numel() == 0) {
    std::fill_n(static_cast<A*>(dscale.mutable_data_ptr()), dscale.numel(), A(0));
    return;
  }
  const Geometry g = geometry_of(in, true);
  const Coefficients<A> scales(g, scale, A(1));
  const Backward task{
      g,
      in.const_data_ptr(),
      delta.const_data_ptr(),
      nullptr,
      out.mutable_data_ptr(),
      static_cast<const uint8_t*>(bits.const_data_ptr()),
      scales.data(),
      negative_slope};
  const Kernels& k = kernel_set().affine_relu(dtype_of(in));
  std::vector<double> result(dscale.numel(), 0.0);
  g.periodic ? sum_over_periods<A>(task, k, result.data()) : sum_over_rows<A>(task, k, result.data());
  std::copy(result.begin(), result.end(), static_cast<A*>(dscale.mutable_data_ptr()));
}

Tensor new_sums(const Tensor& like) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, {like.size(1)}, wide ? ScalarType::Double : ScalarType::Float);
}

void jvp_into(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta,
    const Tensor& out, const Tensor& dscale) {
  const bool channels_last = channels_last_order(u);
  check_same(out, u, channels_last);
  check_same(delta, u, channels_last);
  check_bits(bits, u);
  if (u.scalar_type() == ScalarType::Double) {
    backward_sums<double>(u, bits, scale, negative_slope, delta, out, dscale);
  } else {
    backward_sums<float>(u, bits, scale, negative_slope, delta, out, dscale);
  }
}

}  // namespace

void affine_relu_out(
    const Tensor& a, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& skip,
    double negative_slope, const Tensor& out, const Tensor& bits) {
  const bool channels_last = channels_last_order(a);
  check_same(out, a, channels_last);
  if (skip) {
    check_same(*skip, a, channels_last);
  }
  check_bits(bits, a);
  if (a.scalar_type() == ScalarType::Double) {
    forward<double>(a, scale, shift, skip, negative_slope, out, bits);
  } else {
    forward<float>(a, scale, shift, skip, negative_slope, out, bits);
  }
}

std::tuple<Tensor, Tensor> affine_relu(
    const Tensor& a, const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& skip,
    double negative_slope) {
  Tensor out = torch::stable::empty_like(a);
  Tensor bits = new_bits(a);
  affine_relu_out(a, scale, shift, skip, negative_slope, out, bits);
  return {std::move(out), std::move(bits)};
}

void affine_relu_vjp_out(
    const Tensor& delta, const Tensor& bits, const OptionalTensor& scale, const OptionalTensor& skip,
    double negative_slope, const Tensor& out) {
  const bool channels_last = channels_last_order(delta);
  check_same(out, delta, channels_last);
  if (skip) {
    check_same(*skip, delta, channels_last);
  }
  check_bits(bits, delta);
  if (delta.scalar_type() == ScalarType::Double) {
    backward<double>(delta, bits, scale, skip, negative_slope, out);
  } else {
    backward<float>(delta, bits, scale, skip, negative_slope, out);
  }
}

Tensor affine_relu_vjp(
    const Tensor& delta, const Tensor& bits, const OptionalTensor& scale, const OptionalTensor& skip,
    double negative_slope) {
  Tensor out = torch::stable::empty_like(delta);
  affine_relu_vjp_out(delta, bits, scale, skip, negative_slope, out);
  return out;
}

Tensor affine_relu_jvp_out(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta,
    const Tensor& out) {
  Tensor dscale = new_sums(u);
  jvp_into(u, bits, scale, negative_slope, delta, out, dscale);
  return dscale;
}

std::tuple<Tensor, Tensor> affine_relu_jvp(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta) {
  Tensor out = torch::stable::empty_like(u);
  Tensor dscale = affine_relu_jvp_out(u, bits, scale, negative_slope, delta, out);
  return {std::move(out), std::move(dscale)};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("affine_relu", TORCH_BOX(&emr::cpu::affine_relu));
  m.impl("affine_relu_out", TORCH_BOX(&emr::cpu::affine_relu_out));
  m.impl("affine_relu_vjp", TORCH_BOX(&emr::cpu::affine_relu_vjp));
  m.impl("affine_relu_vjp_out", TORCH_BOX(&emr::cpu::affine_relu_vjp_out));
  m.impl("affine_relu_jvp", TORCH_BOX(&emr::cpu::affine_relu_jvp));
  m.impl("affine_relu_jvp_out", TORCH_BOX(&emr::cpu::affine_relu_jvp_out));
}
