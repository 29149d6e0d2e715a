// logit_seeds of one row, for one member of the team that shares it.
#pragma once

#include "rows.h"

namespace emr::cuda {

template <class T>
struct Seeds {
  const T* logits;        // [N, C]
  const int64_t* label;   // [N] or null
  const int64_t* target;  // [N] or null
  T* seed;                // [N, C]
  float* loss;            // [N], as the two margins
  float* margin;
  float* probability_margin;
  int64_t* runner_up;
  int64_t rows;
  int classes;
  rows::SeedKind kind;
  float temperature;
  bool center;
  bool aligned;  // every row of logits and seed, to 16 bytes
};

// `active`: whether the team's results are wanted; row n exists either way.
template <int ranks, int held, class T, class Team>
EMR_HOST_DEVICE inline void seed_row(const Team& team, const Seeds<T>& s, int64_t n, bool active) {
  const T* const source[1] = {s.logits + n * s.classes};
  const RowsOf<T, 1, held> row(team, source, s.classes, s.aligned);
  int64_t best[ranks];
  rank_row<0>(team, row, best);
  rows::SeedRow<float> r{};
  EMR_UNROLL for (int j = 0; j < ranks; ++j) {
    r.ranked[j] = value_of(best[j]);
    r.places[j] = place_of(best[j]);
  }
  const float top = r.ranked[0];
  const int first = r.places[0];
  r.label = s.label != nullptr ? class_of(s.label[n], s.classes) : first;
  r.target = s.target != nullptr ? class_of(s.target[n], s.classes) : r.label;
  r.at_label = logit_at(source[0], r.label);
  r.at_target = logit_at(source[0], r.target);
  r.e_label = std::exp(r.at_label - top);
  r.e_target = std::exp(r.at_target - top);
  r.e_rival = std::exp(r.at_rival() - top);

  const bool tempered = s.kind == rows::SeedKind::softmax;
  float rest = 0, mixed_rest = 0, mixed = 0, sum = 0;
  row.each([&](int k, const auto& z) {
    const float e = std::exp(z[0] - top);
    rest += k != first ? e : 0.0f;
    if (tempered) {
      const float share = std::exp((z[0] - top) / s.temperature);
      mixed_rest += k != first ? share : 0.0f;
      mixed += share != 0 ? share * z[0] : 0.0f;
    }
    sum += z[0];
  });
  r.rest = team.sum(rest) + (top - top);
  if (tempered) {
    r.mixed_rest = team.sum(mixed_rest) + (top - top);
    r.mixed = team.sum(mixed);
  }
  if (s.center) {
    r.sum = team.sum(sum);
  }

  rows::SeedPlan<float> plan = rows::plan_seed(s.kind, r, s.classes, s.center);
  const bool valid = r.label >= 0 && r.target >= 0;
  plan.shift = valid ? plan.shift : not_a_number();
  if (!active) {
    return;
  }
  if (team.rank() == 0) {
    s.loss[n] = valid ? plan.loss : not_a_number();
    s.margin[n] = plan.margin;
    s.probability_margin[n] = plan.probability_margin;
    s.runner_up[n] = plan.runner_up;
  }
  const bool dense = rows::is_dense(s.kind);
  T* const results[1] = {s.seed + n * s.classes};
  row.put(results, [&](int k, const auto& z, auto& result) {
    float x = plan.shift;
    if (dense) {
      const float below = z[0] - top;
      x += std::exp(tempered ? below / s.temperature : below) * plan.factor;
    }
    EMR_UNROLL for (int j = 0; j < plan.kPlaces; ++j) {
      if (k == plan.places[j]) {
        x = plan.replace && j == 0 ? plan.values[j] : x + plan.values[j];
      }
    }
    result[0] = x;
  });
}

}  // namespace emr::cuda
