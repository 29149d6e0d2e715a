// pgd_step on the CPU.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "../samples.h"
#include "kernel_set.h"
#include "layout.h"

namespace emr::cpu {
namespace {

// A value for each sample, or one for all.
template <class T>
struct PerSample {
  T one;
  const T* each;
  T operator[](int64_t n) const { return each ? each[n] : one; }
};

struct Batch {
  int64_t samples;
  int64_t size;  // elements of a sample
};

template <class F>
void over_samples(const Batch& batch, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 2 * kBlock / batch.size);
  torch::stable::parallel_for(0, batch.samples, grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      f(n);
    }
  });
}

template <class A>
void linf(const Step& s, const StepKernels& k, const Batch& batch, const PerSample<A>& step) {
  over_blocks(batch.samples * batch.size, [&](int64_t begin, int64_t end) {
    if (step.each == nullptr) {
      k.linf(s, step.one, begin, end);
      return;
    }
    for (int64_t i = begin; i < end;) {
      const int64_t n = i / batch.size, next = std::min(end, (n + 1) * batch.size);
      k.linf(s, step[n], i, next);
      i = next;
    }
  });
}

// Sums are sums over the same blocks, whether the work is split by sample or by block.
template <class A>
void l2(const Step& s, const StepKernels& k, SquareSum squares, const Batch& batch, const PerSample<A>& step) {
  const int64_t blocks = (batch.size + kBlock - 1) / kBlock;
  std::vector<double> parts(batch.samples * blocks), scales(batch.samples), shrinks(batch.samples);
  const auto begin = [&](int64_t n, int64_t b) { return n * batch.size + b * kBlock; };
  const auto end = [&](int64_t n, int64_t b) { return n * batch.size + std::min((b + 1) * kBlock, batch.size); };
  const auto root = [&](int64_t n) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      sum += parts[n * blocks + b];
    }
    return static_cast<A>(std::sqrt(sum));
  };

  const auto gradient_squares = [&](int64_t n, int64_t b) {
    parts[n * blocks + b] = squares(s.gradient, begin(n, b), end(n, b));
  };
  const auto set_scale = [&](int64_t n) { scales[n] = step[n] / (root(n) + A(1e-12)); };
  const auto distance_squares = [&](int64_t n, int64_t b) {
    parts[n * blocks + b] = k.l2_squares(s, scales[n], begin(n, b), end(n, b));
  };
  const auto set_shrink = [&](int64_t n) {
    const A distance = root(n), epsilon = static_cast<A>(s.epsilon);
    shrinks[n] = distance <= epsilon ? A(1) : epsilon / distance;
  };
  const auto finish = [&](int64_t n, int64_t b) { k.l2(s, scales[n], shrinks[n], begin(n, b), end(n, b)); };

  if (blocks == 1 || batch.samples >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    over_samples(batch, [&](int64_t n) {
      const auto each = [&](const auto& f) {
        for (int64_t b = 0; b < blocks; ++b) {
          f(n, b);
        }
      };
      each(gradient_squares);
      set_scale(n);
      each(distance_squares);
      set_shrink(n);
      each(finish);
    });
    return;
  }
  const auto each = [&](const auto& f) {
    torch::stable::parallel_for(0, batch.samples * blocks, 2, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        f(i / blocks, i % blocks);
      }
    });
  };
  const auto for_samples = [&](const auto& f) {
    for (int64_t n = 0; n < batch.samples; ++n) {
      f(n);
    }
  };
  each(gradient_squares);
  for_samples(set_scale);
  each(distance_squares);
  for_samples(set_shrink);
  each(finish);
}

// The least number >= 0 for which `above`, true up to some number and false beyond, is false: bisection over the bits,
// which order such numbers. Only numbers whose `zeros` lowest bits are 0 are looked at.
template <class A, class F>
A least_not_above(int zeros, const F& above) {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  if (!above(A(0))) {
    return A(0);
  }
  Bits last = 0;
  for (int bit = static_cast<int>(sizeof(A)) * 8 - 2; bit >= zeros; --bit) {
    const Bits next = last | Bits{1} << bit;
    // Comparisons with the patterns of NaN are false.
    if (above(std::bit_cast<A>(next))) {
      last = next;
    }
  }
  return std::bit_cast<A>(static_cast<Bits>(last + (Bits{1} << zeros)));
}

// Bits of the compute type that are 0 in every value of a dtype.
int zero_bits(Dtype dtype) { return dtype == Dtype::bf16 ? 16 : dtype == Dtype::fp16 ? 13 : 0; }

template <class A>
void l1(
    const Step& s, const StepKernels& k, Dtype gradient, const Batch& batch, const PerSample<A>& step,
    const PerSample<int64_t>& count) {
  const int64_t padded = (batch.size + kUnit - 1) / kUnit * kUnit;
  torch::stable::parallel_for(0, batch.samples, 1, [&](int64_t first, int64_t last) {
    std::vector<A> distance(padded), room(padded);
    for (int64_t n = first; n < last; ++n) {
      const int64_t begin = n * batch.size, end = begin + batch.size;
      // The count-th largest magnitude.
      A* const magnitude = room.data();
      const bool undefined = k.magnitudes(s, magnitude, begin, end) > 0;
      const auto wanted = static_cast<double>(count[n]);
      const A least = least_not_above<A>(
          zero_bits(gradient), [&](A bound) { return k.count_above(magnitude, padded, bound) >= wanted; });
      const A below = std::nextafter(least, A(0));
      const double moved = k.count_above(magnitude, padded, below);
      const A a = step[n] / static_cast<A>(std::max(moved, 1.0));

      const bool undefined_distance = k.distances(s, a, least, distance.data(), room.data(), begin, end) > 0;
      const A cut = undefined || undefined_distance
                        ? std::numeric_limits<A>::quiet_NaN()
                        : least_not_above<A>(0, [&](A c) {
                            return k.excess(distance.data(), room.data(), padded, c) > static_cast<A>(s.epsilon);
                          });
      k.l1(s, a, least, cut, begin, end);
    }
  });
}

template <class A>
void step_as(
    const Step& s, const std::string& norm, Dtype x, Dtype gradient, const Batch& batch, double step_size,
    const OptionalTensor& step_sizes, int64_t count, const OptionalTensor& counts) {
  const StepKernels& k = kernel_set().steps(x, gradient);
  const PerSample<A> step{
      static_cast<A>(step_size), step_sizes ? static_cast<const A*>(step_sizes->const_data_ptr()) : nullptr};
  if (norm == "linf") {
    linf(s, k, batch, step);
  } else if (norm == "l2") {
    l2(s, k, kernel_set().square_sum(gradient), batch, step);
  } else {
    const PerSample<int64_t> moved{
        count, counts ? static_cast<const int64_t*>(counts->const_data_ptr()) : nullptr};
    l1(s, k, gradient, batch, step, moved);
  }
}

}  // namespace

void pgd_step_out(
    const Tensor& x, const Tensor& origin, const Tensor& gradient, double step_size, const OptionalTensor& step_sizes,
    double epsilon, std::string norm, double lower, double upper, int64_t count, const OptionalTensor& counts,
    const Tensor& out) {
  check_step(x, origin, gradient, step_sizes, norm, counts, out);
  if (x.numel() == 0) {
    return;
  }
  const Batch batch{x.size(0), x.numel() / x.size(0)};
  const Step s{x.const_data_ptr(),      origin.const_data_ptr(), gradient.const_data_ptr(),
               out.mutable_data_ptr(), epsilon,                 lower,
               upper};
  const Dtype dtype = dtype_of(x), narrow = dtype_of(gradient);
  if (dtype == Dtype::f64) {
    step_as<double>(s, norm, dtype, narrow, batch, step_size, step_sizes, count, counts);
  } else {
    step_as<float>(s, norm, dtype, narrow, batch, step_size, step_sizes, count, counts);
  }
}

Tensor pgd_step(
    const Tensor& x, const Tensor& origin, const Tensor& gradient, double step_size, const OptionalTensor& step_sizes,
    double epsilon, std::string norm, double lower, double upper, int64_t count, const OptionalTensor& counts) {
  Tensor out = torch::stable::empty_like(x);
  pgd_step_out(x, origin, gradient, step_size, step_sizes, epsilon, norm, lower, upper, count, counts, out);
  return out;
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("pgd_step", TORCH_BOX(&emr::cpu::pgd_step));
  m.impl("pgd_step_out", TORCH_BOX(&emr::cpu::pgd_step_out));
}
