// Runs the bodies of the CUDA kernels over rows on the CPU: a team is as many threads as share a row on the GPU, in step
// through a barrier. Compiled and called by test_row_bodies.py.
#include <barrier>
#include <thread>
#include <vector>

#include "cuda/logit_seeds.h"
#include "cuda/robust_losses.h"

namespace {

using namespace emr::cuda;
namespace rows = emr::rows;

class Team {
 public:
  struct Shared {
    explicit Shared(int size) : size(size), step(size), floats(size), orders(size) {}
    int size;
    std::barrier<> step;
    std::vector<float> floats;
    std::vector<int64_t> orders;
  };
  Team(Shared& shared, int rank) : shared_(shared), rank_(rank) {}

  int rank() const { return rank_; }
  int size() const { return shared_.size; }
  float sum(float x) const {
    float total = 0;
    for (const float value : exchange(shared_.floats, x)) {
      total += value;
    }
    return total;
  }
  int64_t max(int64_t x) const {
    for (const int64_t value : exchange(shared_.orders, x)) {
      x = value > x ? value : x;
    }
    return x;
  }

 private:
  template <class T>
  std::vector<T> exchange(std::vector<T>& places, T x) const {
    places[rank_] = x;
    shared_.step.arrive_and_wait();
    const std::vector<T> all = places;
    shared_.step.arrive_and_wait();
    return all;
  }
  Shared& shared_;
  int rank_;
};

// Calls f(team, n, active) for each row, and once more for a team beyond the last.
template <class F>
void over_rows(int64_t count, int size, const F& f) {
  Team::Shared shared(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      const Team team(shared, rank);
      for (int64_t n = 0; n <= count; ++n) {
        f(team, n < count ? n : count - 1, n < count);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// Calls f with the number of held elements as a constant, and the size of a team.
template <class F>
void by_held(int64_t classes, const F& f) {
  constexpr int kBlock = 16;  // stands for a block's 256
  switch (held_for(classes)) {
    case kFewHeld:
      return f(std::integral_constant<int, kFewHeld>{}, team_width(classes, kFewHeld));
    case kManyHeld:
      return f(std::integral_constant<int, kManyHeld>{}, team_width(classes, kManyHeld));
    default:
      return f(std::integral_constant<int, 0>{}, kBlock);
  }
}

template <class T>
void run(Seeds<T> s) {
  s.aligned = s.classes % kLanes<T> == 0 && is_aligned(s.logits) && is_aligned(s.seed);
  by_held(s.classes, [&](auto held, int size) {
    over_rows(s.rows, size, [&](const Team& team, int64_t n, bool active) {
      rows::ranks_of(s.kind) == 4 ? seed_row<4, held.value>(team, s, n, active)
                                  : seed_row<2, held.value>(team, s, n, active);
    });
  });
}

template <class T>
void run(Losses<T> s) {
  s.aligned = s.options.classes % kLanes<T> == 0 && is_aligned(s.logits[0]) && is_aligned(s.logits[1]) &&
              is_aligned(s.gradients[0]) && is_aligned(s.gradients[1]);
  by_held(s.options.classes, [&](auto held, int size) {
    over_rows(s.rows, size, [&](const Team& team, int64_t n, bool active) {
      s.logits[1] != nullptr ? loss_row<2, held.value>(team, s, n, active) : loss_row<1, held.value>(team, s, n, active);
    });
  });
}

template <class T>
void seeds_as(
    const void* logits, const int64_t* label, const int64_t* target, void* seed, float* const (&each)[3],
    int64_t* runner_up, int64_t count, int classes, int kind, float temperature, bool center) {
  run(Seeds<T>{
      static_cast<const T*>(logits), label, target, static_cast<T*>(seed), each[0], each[1], each[2], runner_up, count,
      classes, static_cast<rows::SeedKind>(kind), temperature, center, false});
}

template <class T>
void losses_as(
    const void* adversarial, const void* clean, const int64_t* label, const float* weight, float* loss, float* grad,
    float* clean_grad, int64_t count, const rows::LossOptions& options) {
  run(Losses<T>{
      {static_cast<const T*>(adversarial), static_cast<const T*>(clean)}, label, weight, loss, {grad, clean_grad}, count,
      options, false});
}

}  // namespace

extern "C" {

void logit_seeds(
    int dtype, const void* logits, const int64_t* label, const int64_t* target, void* seed, float* loss, float* margin,
    float* probability_margin, int64_t* runner_up, int64_t count, int classes, int kind, float temperature,
    bool center) {
  float* const each[3] = {loss, margin, probability_margin};
  const auto as = dtype == 0   ? seeds_as<float>
                  : dtype == 1 ? seeds_as<emr::bf16>
                               : seeds_as<emr::fp16>;
  as(logits, label, target, seed, each, runner_up, count, classes, kind, temperature, center);
}

void robust_losses(
    int dtype, const void* adversarial, const void* clean, const int64_t* label, const float* weight, float* loss,
    float* grad, float* clean_grad, int64_t count, int classes, int kind, double beta, double smoothing, bool mail,
    double slope, double bias) {
  const rows::LossOptions options{static_cast<rows::LossKind>(kind), beta, smoothing, mail, slope, bias, classes};
  const auto as = dtype == 0   ? losses_as<float>
                  : dtype == 1 ? losses_as<emr::bf16>
                               : losses_as<emr::fp16>;
  as(adversarial, clean, label, weight, loss, grad, clean_grad, count, options);
}
}
