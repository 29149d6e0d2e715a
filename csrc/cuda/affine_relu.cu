// affine_relu, its vjp and its jvp on a GPU.
#include "affine_relu.h"
#include "launch.cuh"

namespace emr::cuda {
namespace {

// All lanes of the warp take part.
template <class T>
__device__ void put_bits(uint8_t* bits, int64_t vector, int64_t numel, uint32_t own) {
  const uint32_t next = kLanes<T> == 8 ? 0 : __shfl_down_sync(0xffffffffu, own, 1);
  store_bits<T>(bits, vector, numel, own, next);
}

template <class T, bool has_skip>
__global__ void __launch_bounds__(kThreads) affine_relu_rows_kernel(Forward<T> f, Rows g) {
  const int64_t block = blockIdx.x;
  const uint32_t bits = forward_rows_thread<T, has_skip>(f, g, block, threadIdx.x);
  EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
    put_bits<T>(f.bits, block * kBlockVectors + u * kThreads + threadIdx.x, f.numel, bits >> (8 * u) & 0xff);
  }
}

template <class T, bool has_skip>
__global__ void __launch_bounds__(kThreads) affine_relu_periodic_kernel(Forward<T> f, Periodic g) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t along = gridDim.y, steps = (g.vectors + g.places() - 1) / g.places();
  const bool active = place < g.places();
  const EachChannel<kLanes<T>> coefs[1] = {channels_at<kLanes<T>>(g, place)};
  for (int64_t step = blockIdx.y; step < steps; step += kUnroll * along) {
    uint32_t bits = 0;
    if (active) {
      bits = forward_periodic_thread<T, has_skip>(f, g, coefs, place, step, along);
    }
    EMR_UNROLL for (int u = 0; u < kUnroll; ++u) {
      const int64_t vector = (step + u * along) * g.places() + place;
      put_bits<T>(f.bits, active ? vector : g.vectors, f.numel, bits >> (8 * u) & 0xff);
    }
  }
}

template <class T, Second role>
__global__ void __launch_bounds__(kThreads) affine_relu_vjp_rows_kernel(Backward<T> f, Rows g) {
  backward_rows_thread<T, role>(f, g, blockIdx.x, threadIdx.x);
}

template <class T, Second role>
__global__ void __launch_bounds__(kThreads) affine_relu_vjp_periodic_kernel(Backward<T> f, Periodic g) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t along = gridDim.y, steps = (g.vectors + g.places() - 1) / g.places();
  if (place >= g.places()) {
    return;
  }
  const EachChannel<kLanes<T>> coefs[1] = {channels_at<kLanes<T>>(g, place)};
  for (int64_t step = blockIdx.y; step < steps; step += kUnroll * along) {
    backward_periodic_thread<T, role>(f, g, coefs, place, step, along, AddNothing{});
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    affine_relu_jvp_rows_kernel(Backward<T> f, Rows g, Pieces p, float* table) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / p.lanes) + threadIdx.x / p.lanes;
  const int lane = threadIdx.x % p.lanes;
  RowSums sums{0, 0};
  if (unit < p.units()) {
    sums = backward_piece_thread<T>(f, g, p, unit, lane);
  }
  sums.own = sum_lanes(sums.own, p.lanes);
  sums.next = sum_lanes(sums.next, p.lanes);
  if (unit < p.units() && lane == 0) {
    store_piece<T>(table, g, p, unit, sums);
  }
}

// table: [gridDim.y, C] where one block covers all places, else [gridDim.y, elements of a period].
template <class T>
__global__ void __launch_bounds__(kThreads) affine_relu_jvp_periodic_kernel(Backward<T> f, Periodic g, float* table) {
  constexpr int lanes = kLanes<T>;
  __shared__ float shared[kThreads * lanes];
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t along = gridDim.y, steps = (g.vectors + g.places() - 1) / g.places();
  Lanes<T> totals{};
  if (place < g.places()) {
    const EachChannel<lanes> coefs[1] = {channels_at<lanes>(g, place)};
    const auto add = [&totals](const auto&, const Lanes<T>& products) {
      EMR_UNROLL for (int i = 0; i < lanes; ++i) {
        totals.v[i] += products.v[i];
      }
    };
    for (int64_t step = blockIdx.y; step < steps; step += kUnroll * along) {
      backward_periodic_thread<T, Second::delta>(f, g, coefs, place, step, along, add);
    }
    float* mine = gridDim.x == 1 ? shared + place * lanes : table + (blockIdx.y * g.places() + place) * lanes;
    EMR_UNROLL for (int i = 0; i < lanes; ++i) {
      mine[i] = totals.v[i];
    }
  }
  if (gridDim.x > 1) {
    return;
  }
  __syncthreads();
  // As many threads for a channel as it has terms, a power of two.
  const int64_t terms = g.places() * lanes / g.channels;
  int parts = 1;
  while (parts < kWarp && parts * 2 <= terms) {
    parts *= 2;
  }
  const int groups = blockDim.x / parts, group = threadIdx.x / parts, part = threadIdx.x % parts;
  for (int64_t base = 0; base < g.channels; base += groups) {
    const int64_t channel = base + group;
    float sum = channel < g.channels ? channel_part(shared, lanes, g, channel, part, parts) : 0.0f;
    sum = sum_lanes(sum, parts);
    if (channel < g.channels && part == 0) {
      table[blockIdx.y * g.channels + channel] = sum;
    }
  }
}

// blockDim: (channels of a block, parts of a channel), powers of two.
__global__ void __launch_bounds__(kThreads) sum_table_kernel(Table t, float* result) {
  __shared__ double shared[kThreads];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  double* mine = shared + threadIdx.y * blockDim.x + threadIdx.x;
  *mine = channel < t.channels ? table_part(t, channel, threadIdx.y, blockDim.y) : 0.0;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
      *mine += mine[half * blockDim.x];
    }
  }
  if (threadIdx.y == 0 && channel < t.channels) {
    result[channel] = static_cast<float>(*mine);
  }
}

// A tensor seen as [N, channels, inner] in memory.
struct View {
  int64_t numel, channels, inner;

  View(const Tensor& t, bool channels_last, bool per_channel) : numel(t.numel()), channels(1), inner(numel) {
    if (per_channel) {
      STD_TORCH_CHECK(t.dim() >= 2, "expected [N, C, ...]");
      if (t.size(1) > 1) {
        channels = t.size(1);
        inner = channels_last ? 1 : numel / (t.size(0) * channels);
      }
    }
    STD_TORCH_CHECK(channels < (int64_t{1} << 30), "expected fewer than 2^30 channels");
  }
  bool periodic() const { return inner < kShortRow && channels > 1; }
};

const float* coefficients(const OptionalTensor& vector, const View& view) {
  if (!vector) {
    return nullptr;
  }
  STD_TORCH_CHECK(
      vector->scalar_type() == ScalarType::Float && vector->is_contiguous() && vector->numel() == view.channels,
      "expected one contiguous float32 coefficient for each channel");
  return static_cast<const float*>(vector->const_data_ptr());
}

template <class T>
unsigned rows_grid(const Rows& g) {
  return blocks_for(g.numel, kBlockVectors * kLanes<T>);
}

dim3 dimensions(const PeriodicGrid& grid) {
  return {blocks_for(grid.across, 1), static_cast<unsigned>(grid.along), 1};
}

template <class... Tensors>
bool all_aligned(const Tensors&... tensors) {
  return (is_aligned(tensors.const_data_ptr()) && ...);
}

Tensor new_table(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}, ScalarType::Float); }

void sum_table(const Tensor& sums, int64_t outer, int64_t channels, int64_t inner, float* result, cudaStream_t stream) {
  STD_TORCH_CHECK(outer * inner < (int64_t{1} << 31), "a tensor too large for the sums of one launch");
  const Table table(static_cast<const float*>(sums.const_data_ptr()), outer, channels, inner);
  unsigned across = 1;
  while (across < 8 && across < channels) {
    across *= 2;
  }
  sum_table_kernel<<<blocks_for(channels, across), dim3(across, kThreads / across), 0, stream>>>(table, result);
  check_launch("sum_table");
}

template <class T>
void forward(const Forward<T>& f, const View& view, const float* scale, const float* shift, cudaStream_t stream) {
  by_bool(f.skip != nullptr, [&](auto has_skip) {
    if (view.periodic()) {
      const Periodic g(kLanes<T>, view.numel, view.channels, view.inner, scale, shift);
      const dim3 grid = dimensions(PeriodicGrid::plain(g));
      affine_relu_periodic_kernel<T, has_skip.value><<<grid, g.threads(), 0, stream>>>(f, g);
    } else {
      const Rows g(view.numel, view.channels, view.inner, scale, shift);
      affine_relu_rows_kernel<T, has_skip.value><<<rows_grid<T>(g), kThreads, 0, stream>>>(f, g);
    }
  });
  check_launch("affine_relu");
}

template <class T, Second role>
void backward(const Backward<T>& f, const View& view, const float* scale, cudaStream_t stream) {
  if (view.periodic()) {
    const Periodic g(kLanes<T>, view.numel, view.channels, view.inner, scale, nullptr);
    affine_relu_vjp_periodic_kernel<T, role><<<dimensions(PeriodicGrid::plain(g)), g.threads(), 0, stream>>>(f, g);
  } else {
    const Rows g(view.numel, view.channels, view.inner, scale, nullptr);
    affine_relu_vjp_rows_kernel<T, role><<<rows_grid<T>(g), kThreads, 0, stream>>>(f, g);
  }
  check_launch("affine_relu_vjp");
}

template <class T>
void backward_sums(
    const Backward<T>& f, const View& view, const float* scale, const Tensor& like, float* dscale,
    cudaStream_t stream) {
  if (view.periodic()) {
    const Periodic g(kLanes<T>, view.numel, view.channels, view.inner, scale, nullptr);
    const dim3 grid = dimensions(PeriodicGrid::summing(g));
    const bool by_channel = grid.x == 1;
    const int64_t elements = g.places() * kLanes<T>;
    const Tensor table = new_table(like, grid.y * (by_channel ? g.channels : elements));
    affine_relu_jvp_periodic_kernel<T>
        <<<grid, g.threads(), 0, stream>>>(f, g, static_cast<float*>(table.mutable_data_ptr()));
    check_launch("affine_relu_jvp");
    const int64_t samples = by_channel ? 1 : elements / (g.channels * g.inner);
    sum_table(table, grid.y * samples, g.channels, by_channel ? 1 : g.inner, dscale, stream);
  } else {
    const Rows g(view.numel, view.channels, view.inner, scale, nullptr);
    const Pieces p(kLanes<T>, view.numel, view.inner);
    const Tensor table = new_table(like, p.rows * p.columns());
    affine_relu_jvp_rows_kernel<T><<<blocks_for(p.units(), kThreads / p.lanes), kThreads, 0, stream>>>(
        f, g, p, static_cast<float*>(table.mutable_data_ptr()));
    check_launch("affine_relu_jvp");
    sum_table(table, p.rows / view.channels, view.channels, p.columns(), dscale, stream);
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
  if (a.numel() == 0) {
    return;
  }
  const OnDeviceOf device(a);
  const View view(a, channels_last, scale.has_value() || shift.has_value());
  by_dtype(a, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> f{
        static_cast<const T*>(a.const_data_ptr()),
        skip ? static_cast<const T*>(skip->const_data_ptr()) : nullptr,
        static_cast<T*>(out.mutable_data_ptr()),
        static_cast<uint8_t*>(bits.mutable_data_ptr()),
        view.numel,
        static_cast<float>(negative_slope),
        all_aligned(a, out, skip ? *skip : a)};
    forward(f, view, coefficients(scale, view), coefficients(shift, view), device.stream());
  });
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
  if (delta.numel() == 0) {
    return;
  }
  const OnDeviceOf device(delta);
  const View view(delta, channels_last, scale.has_value());
  by_dtype(delta, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Backward<T> f{
        static_cast<const T*>(delta.const_data_ptr()),
        skip ? static_cast<const T*>(skip->const_data_ptr()) : nullptr,
        static_cast<T*>(out.mutable_data_ptr()),
        static_cast<const uint8_t*>(bits.const_data_ptr()),
        view.numel,
        static_cast<float>(negative_slope),
        all_aligned(delta, out, skip ? *skip : delta)};
    skip ? backward<T, Second::skip>(f, view, coefficients(scale, view), device.stream())
         : backward<T, Second::none>(f, view, coefficients(scale, view), device.stream());
  });
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
  const bool channels_last = channels_last_order(u);
  check_same(out, u, channels_last);
  check_same(delta, u, channels_last);
  check_bits(bits, u);
  STD_TORCH_CHECK(u.dim() >= 2, "expected [N, C, ...]");
  const OnDeviceOf device(u);
  Tensor dscale = torch::stable::new_empty(u, {u.size(1)}, ScalarType::Float);
  auto* sums = static_cast<float*>(dscale.mutable_data_ptr());
  if (u.numel() == 0) {
    if (dscale.numel() > 0) {
      check(cudaMemsetAsync(sums, 0, dscale.numel() * sizeof(float), device.stream()), "cudaMemsetAsync");
    }
    return dscale;
  }
  const View view(u, channels_last, true);
  by_dtype(u, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Backward<T> f{
        static_cast<const T*>(u.const_data_ptr()),
        static_cast<const T*>(delta.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        static_cast<const uint8_t*>(bits.const_data_ptr()),
        view.numel,
        static_cast<float>(negative_slope),
        all_aligned(u, delta, out)};
    backward_sums(f, view, coefficients(scale, view), u, sums, device.stream());
  });
  return dscale;
}

std::tuple<Tensor, Tensor> affine_relu_jvp(
    const Tensor& u, const Tensor& bits, const OptionalTensor& scale, double negative_slope, const Tensor& delta) {
  Tensor out = torch::stable::empty_like(u);
  Tensor dscale = affine_relu_jvp_out(u, bits, scale, negative_slope, delta, out);
  return {std::move(out), std::move(dscale)};
}

}  // namespace emr::cuda

STABLE_TORCH_LIBRARY_IMPL(emr_cuda, CUDA, m) {
  m.impl("affine_relu", TORCH_BOX(&emr::cuda::affine_relu));
  m.impl("affine_relu_out", TORCH_BOX(&emr::cuda::affine_relu_out));
  m.impl("affine_relu_vjp", TORCH_BOX(&emr::cuda::affine_relu_vjp));
  m.impl("affine_relu_vjp_out", TORCH_BOX(&emr::cuda::affine_relu_vjp_out));
  m.impl("affine_relu_jvp", TORCH_BOX(&emr::cuda::affine_relu_jvp));
  m.impl("affine_relu_jvp_out", TORCH_BOX(&emr::cuda::affine_relu_jvp_out));
}
