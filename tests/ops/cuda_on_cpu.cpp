// Runs the bodies of the CUDA kernels on the CPU: every thread of every block in turn, and what lanes exchange through
// shuffles and shared memory in between. Compiled and called by test_cuda_bodies.py.
#include <vector>

#include "cuda/affine_relu.h"
#include "cuda/bits.h"

namespace {

using namespace emr::cuda;

bool periodic(int64_t channels, int64_t inner) { return inner < kShortRow && channels > 1; }

// As put_bits does it, with a shuffle: `bits` of a block's threads, one byte for each vector in flight.
template <class T, class VectorOf>
void put_bits(const Forward<T>& f, const std::vector<uint32_t>& bits, const VectorOf& vector_of) {
  for (size_t t = 0; t < bits.size(); ++t) {
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t own = bits[t] >> (8 * u) & 0xff;
      const uint32_t next = kLanes<T> == 8 || t + 1 == bits.size() ? 0 : bits[t + 1] >> (8 * u) & 0xff;
      emr::cuda::store_bits<T>(f.bits, vector_of(t, u), f.numel, own, next);
    }
  }
}

template <class T, bool has_skip>
void forward(const Forward<T>& f, int64_t channels, int64_t inner, const float* scale, const float* shift) {
  if (!periodic(channels, inner)) {
    const Rows g(f.numel, channels, inner, scale, shift);
    const int64_t blocks = divide_up(f.numel, kBlockVectors * kLanes<T>);
    for (int64_t block = 0; block < blocks; ++block) {
      std::vector<uint32_t> bits(kThreads);
      for (int t = 0; t < kThreads; ++t) {
        bits[t] = forward_rows_thread<T, has_skip>(f, g, block, t);
      }
      put_bits(f, bits, [&](int64_t t, int u) { return block * kBlockVectors + u * kThreads + t; });
    }
    return;
  }
  const Periodic g(kLanes<T>, f.numel, channels, inner, scale, shift);
  const PeriodicGrid grid = PeriodicGrid::plain(g);
  for (int64_t x = 0; x < grid.across; ++x) {
    for (int64_t y = 0; y < grid.along; ++y) {
      for (int64_t step = y; step < g.steps(); step += kUnroll * grid.along) {
        std::vector<uint32_t> bits(g.threads());
        for (int t = 0; t < g.threads(); ++t) {
          const int64_t place = x * kThreads + t;
          const EachChannel<kLanes<T>> coefs[1] = {channels_at<kLanes<T>>(g, place)};
          bits[t] = place < g.places() ? forward_periodic_thread<T, has_skip>(f, g, coefs, place, step, grid.along) : 0;
        }
        put_bits(f, bits, [&](int64_t t, int u) {
          const int64_t place = x * kThreads + t;
          return place < g.places() ? (step + u * grid.along) * g.places() + place : g.vectors;
        });
      }
    }
  }
}

template <class T, Second role>
void backward(const Backward<T>& f, int64_t channels, int64_t inner, const float* scale) {
  if (!periodic(channels, inner)) {
    const Rows g(f.numel, channels, inner, scale, nullptr);
    const int64_t blocks = divide_up(f.numel, kBlockVectors * kLanes<T>);
    for (int64_t block = 0; block < blocks; ++block) {
      for (int t = 0; t < kThreads; ++t) {
        backward_rows_thread<T, role>(f, g, block, t);
      }
    }
    return;
  }
  const Periodic g(kLanes<T>, f.numel, channels, inner, scale, nullptr);
  const PeriodicGrid grid = PeriodicGrid::plain(g);
  for (int64_t place = 0; place < g.places(); ++place) {
    const EachChannel<kLanes<T>> coefs[1] = {channels_at<kLanes<T>>(g, place)};
    for (int64_t y = 0; y < grid.along; ++y) {
      for (int64_t step = y; step < g.steps(); step += kUnroll * grid.along) {
        backward_periodic_thread<T, role>(f, g, coefs, place, step, grid.along, AddNothing{});
      }
    }
  }
}

void sum_table(const std::vector<float>& sums, int64_t outer, int64_t channels, int64_t inner, float* result) {
  const Table table(sums.data(), outer, channels, inner);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (uint32_t part = 0; part < 32; ++part) {
      sum += table_part(table, c, part, 32);
    }
    result[c] = static_cast<float>(sum);
  }
}

constexpr float kUnwritten = 1e30f;

template <class T>
void sums_of_rows(const Backward<T>& f, int64_t channels, int64_t inner, const float* scale, float* dscale) {
  const Rows g(f.numel, channels, inner, scale, nullptr);
  const Pieces p(kLanes<T>, f.numel, inner);
  std::vector<float> table(p.rows * p.columns(), kUnwritten);
  for (int64_t unit = 0; unit < p.units(); ++unit) {
    RowSums total{0, 0};
    for (int lane = 0; lane < p.lanes; ++lane) {
      const RowSums part = backward_piece_thread<T>(f, g, p, unit, lane);
      total.own += part.own;
      total.next += part.next;
    }
    store_piece<T>(table.data(), g, p, unit, total);
  }
  sum_table(table, p.rows / channels, channels, p.columns(), dscale);
}

template <class T>
void sums_of_periods(const Backward<T>& f, int64_t channels, int64_t inner, const float* scale, float* dscale) {
  constexpr int lanes = kLanes<T>;
  const Periodic g(lanes, f.numel, channels, inner, scale, nullptr);
  const PeriodicGrid grid = PeriodicGrid::summing(g);
  const bool by_channel = grid.across == 1;
  const int64_t width = by_channel ? channels : g.places() * lanes;
  std::vector<float> table(grid.along * width, kUnwritten);
  for (int64_t y = 0; y < grid.along; ++y) {
    std::vector<float> totals(g.places() * lanes);
    for (int64_t place = 0; place < g.places(); ++place) {
      const EachChannel<lanes> coefs[1] = {channels_at<lanes>(g, place)};
      const auto add = [&](const auto&, const Lanes<T>& products) {
        for (int i = 0; i < lanes; ++i) {
          totals[place * lanes + i] += products.v[i];
        }
      };
      for (int64_t step = y; step < g.steps(); step += kUnroll * grid.along) {
        backward_periodic_thread<T, Second::delta>(f, g, coefs, place, step, grid.along, add);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      table[y * width + i] = by_channel ? 0 : totals[i];
      for (int part = 0; by_channel && part < 4; ++part) {
        table[y * width + i] += channel_part(totals.data(), lanes, g, i, part, 4);
      }
    }
  }
  const int64_t samples = by_channel ? 1 : width / (channels * inner);
  sum_table(table, grid.along * samples, channels, by_channel ? 1 : inner, dscale);
}

template <class T>
void run_forward(
    const void* a, const void* skip, void* y, uint8_t* bits, int64_t numel, int64_t channels, int64_t inner,
    const float* scale, const float* shift, float slope) {
  const bool aligned = is_aligned(a) && is_aligned(skip) && is_aligned(y);
  const Forward<T> f{
      static_cast<const T*>(a), static_cast<const T*>(skip), static_cast<T*>(y), bits, numel, slope, aligned};
  skip != nullptr ? forward<T, true>(f, channels, inner, scale, shift)
                  : forward<T, false>(f, channels, inner, scale, shift);
}

template <class T>
void run_backward(
    const void* in, const void* second, void* out, const uint8_t* bits, int64_t numel, int64_t channels, int64_t inner,
    const float* scale, float slope, float* dscale) {
  const bool aligned = is_aligned(in) && is_aligned(second) && is_aligned(out);
  const Backward<T> f{
      static_cast<const T*>(in), static_cast<const T*>(second), static_cast<T*>(out), bits, numel, slope, aligned};
  if (dscale == nullptr) {
    second != nullptr ? backward<T, Second::skip>(f, channels, inner, scale)
                      : backward<T, Second::none>(f, channels, inner, scale);
  } else if (periodic(channels, inner)) {
    sums_of_periods(f, channels, inner, scale, dscale);
  } else {
    sums_of_rows(f, channels, inner, scale, dscale);
  }
}

}  // namespace

extern "C" {

void affine_relu(
    int dtype, const void* a, const void* skip, void* y, uint8_t* bits, int64_t numel, int64_t channels, int64_t inner,
    const float* scale, const float* shift, float slope) {
  const auto run = dtype == 0 ? run_forward<float> : dtype == 1 ? run_forward<emr::bf16> : run_forward<emr::fp16>;
  run(a, skip, y, bits, numel, channels, inner, scale, shift, slope);
}

// The jvp with dscale, the second tensor delta; without it the vjp, the second tensor a skip or null.
void backward(
    int dtype, const void* in, const void* second, void* out, const uint8_t* bits, int64_t numel, int64_t channels,
    int64_t inner, const float* scale, float slope, float* dscale) {
  const auto run = dtype == 0 ? run_backward<float> : dtype == 1 ? run_backward<emr::bf16> : run_backward<emr::fp16>;
  run(in, second, out, bits, numel, channels, inner, scale, slope, dscale);
}

void pack_bits(const uint8_t* mask, uint8_t* bits, int64_t numel) {
  for (int64_t t = 0; t * kPackedByThread < numel; ++t) {
    is_aligned(mask) ? pack_bits_thread<true>(mask, bits, numel, t) : pack_bits_thread<false>(mask, bits, numel, t);
  }
}

uint32_t divide(uint32_t n, uint32_t d) { return Divider(d).divide(n); }

// The two channels of the vector `ahead` elements after `start`, and how many of its elements have the first.
void channels_of(
    int64_t start, int ahead, int64_t channels, int64_t inner, const float* numbers, int* first, int* second,
    int* split) {
  const Rows g(0, channels, inner, numbers, nullptr);
  const TwoChannels c = channels_at<8>(g, row_start(g, start), ahead);
  *first = static_cast<int>(c.scale0);
  *second = static_cast<int>(c.scale1);
  *split = c.split;
}
}
