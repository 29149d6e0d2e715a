// pgd_start on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../philox.h"
#include "../samples.h"
#include "layout.h"

namespace emr::cpu {
namespace {

template <class T>
struct Ball {
  using A = compute_t<T>;
  const T* origin;
  T* out;
  Random random;
  A epsilon, lower, upper;

  void write(int64_t i, A noise) const {
    A t = widened(origin[i]) + noise;
    t = t < lower ? lower : t;
    t = t > upper ? upper : t;
    out[i] = narrowed<T>(t);
  }
};

// Calls f(block, first, last) for the parts of blocks of four elements that make up [begin, end).
template <class F>
void over_fours(int64_t begin, int64_t end, const F& f) {
  for (int64_t i = begin; i < end;) {
    const int64_t last = std::min((i | 3) + 1, end);
    f(i >> 2, i, last);
    i = last;
  }
}

template <class T>
void linf(const Ball<T>& ball, int64_t numel) {
  over_blocks(numel, [&](int64_t begin, int64_t end) {
    over_fours(begin, end, [&](int64_t block, int64_t first, int64_t last) {
      const Words words = ball.random.words(block, 0);
      for (int64_t i = first; i < last; ++i) {
        ball.write(i, ball.epsilon * signed_uniform<typename Ball<T>::A>(words.w[i & 3]));
      }
    });
  });
}

// Sample n: its draws, then the same scaled into the ball.
template <class T, bool gaussian, class A = compute_t<T>>
void sample(const Ball<T>& ball, int64_t n, int64_t size, A* draws) {
  const int64_t origin = n * size;
  double total = 0;
  over_fours(origin, origin + size, [&](int64_t block, int64_t first, int64_t last) {
    A four[4];
    const Words words = ball.random.words(block, 0);
    gaussian ? gaussians(words, four) : laplacians(words, four);
    for (int64_t i = first; i < last; ++i) {
      const A z = four[i & 3];
      draws[i - origin] = z;
      total += gaussian ? z * z : std::abs(z);
    }
  });
  const A once = unit_uniform<A>(ball.random.words(n, 1).w[0]);
  const A radius = gaussian ? ball.epsilon * power_of(once, A(1) / static_cast<A>(size)) : ball.epsilon;
  const A length = static_cast<A>(gaussian ? std::sqrt(total) : total - log_of(once));
  const A scale = radius / std::max(length, std::numeric_limits<A>::min());
  for (int64_t i = 0; i < size; ++i) {
    ball.write(origin + i, draws[i] * scale);
  }
}

template <class T>
void start(
    const Tensor& origin, const Tensor& out, const std::string& norm, const Random& random, double epsilon,
    double lower, double upper) {
  using A = compute_t<T>;
  const Ball<T> ball{
      static_cast<const T*>(origin.const_data_ptr()),
      static_cast<T*>(out.mutable_data_ptr()),
      random,
      static_cast<A>(epsilon),
      static_cast<A>(lower),
      static_cast<A>(upper)};
  if (norm == "linf") {
    linf(ball, origin.numel());
    return;
  }
  const int64_t size = origin.numel() / origin.size(0);
  const int64_t grain = std::max<int64_t>(1, 4096 / size);
  torch::stable::parallel_for(0, origin.size(0), grain, [&](int64_t first, int64_t last) {
    std::vector<A> draws(size);
    for (int64_t n = first; n < last; ++n) {
      norm == "l2" ? sample<T, true>(ball, n, size, draws.data()) : sample<T, false>(ball, n, size, draws.data());
    }
  });
}

}  // namespace

Tensor pgd_start(
    const Tensor& origin, double epsilon, std::string norm, int64_t seed, int64_t offset, double lower, double upper) {
  STD_TORCH_CHECK(origin.dim() >= 1, "expected [N, ...]");
  check_norm(norm);
  channels_last_order(origin);
  const Random random{static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
  Tensor out = torch::stable::empty_like(origin);
  if (origin.numel() == 0) {
    return out;
  }
  switch (dtype_of(origin)) {
    case Dtype::f32:
      start<float>(origin, out, norm, random, epsilon, lower, upper);
      break;
    case Dtype::f64:
      start<double>(origin, out, norm, random, epsilon, lower, upper);
      break;
    case Dtype::bf16:
      start<bf16>(origin, out, norm, random, epsilon, lower, upper);
      break;
    case Dtype::fp16:
      start<fp16>(origin, out, norm, random, epsilon, lower, upper);
      break;
  }
  return out;
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("pgd_start", TORCH_BOX(&emr::cpu::pgd_start));
}
