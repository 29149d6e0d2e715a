// robust_losses of one row, for one member of the team that shares it.
#pragma once

#include "rows.h"

namespace emr::cuda {

template <class T>
struct Losses {
  const T* logits[2];    // adversarial and clean, [N, C]; null without clean ones
  const int64_t* label;  // [N] or null
  const float* weight;   // [N] or null
  float* loss;           // [N]
  float* gradients[2];   // like the logits
  int64_t rows;
  rows::LossOptions options;
  bool aligned;  // every row of logits and gradients, to 16 bytes
};

// `count`: 1 without clean logits, else 2. `active`: whether the team's results are wanted; row n exists either way.
template <int count, int held, class T, class Team>
EMR_HOST_DEVICE inline void loss_row(const Team& team, const Losses<T>& s, int64_t n, bool active) {
  const rows::LossOptions& o = s.options;
  const int classes = o.classes;
  const bool boosted = o.boosted();
  const T* source[count];
  float* results[count];
  EMR_UNROLL for (int r = 0; r < count; ++r) {
    source[r] = s.logits[r] + n * classes;
    results[r] = s.gradients[r] + n * classes;
  }
  const RowsOf<T, count, held> both(team, source, classes, s.aligned);
  int64_t best[2], clean_best[1] = {kNothing};
  rank_row<0>(team, both, best);
  if constexpr (count == 2) {
    rank_row<1>(team, both, clean_best);
  }
  const float top = value_of(best[0]), clean_top = count == 2 ? value_of(clean_best[0]) : 0.0f;
  const int first = place_of(best[0]), clean_first = count == 2 ? place_of(clean_best[0]) : -1;

  float rest = 0, clean_rest = 0, spread = 0;
  both.each([&](int k, const auto& z) {
    rest += k != first ? std::exp(z[0] - top) : 0.0f;
    if constexpr (count == 2) {
      clean_rest += k != clean_first ? std::exp(z[1] - clean_top) : 0.0f;
    }
    spread += count == 2 ? clean_top - z[count - 1] : top - z[0];
  });
  rows::LossRow<float> r{};
  r.label = s.label != nullptr ? class_of(s.label[n], classes) : first;
  // A row whose largest is not finite, or whose label is out of range, is NaN throughout.
  const float poison = r.label >= 0 ? 0.0f : not_a_number();
  r.adv = {top, team.sum(rest) + (top - top) + poison, first};
  r.clean = {clean_top, 0.0f, clean_first};
  if constexpr (count == 2) {
    r.clean.rest = team.sum(clean_rest) + (clean_top - clean_top) + poison;
  }
  if (o.smoothing != 0) {
    r.spread = team.sum(spread);
  }
  r.rival = first == r.label ? place_of(best[1]) : first;
  r.adv_at_label = logit_at(source[0], r.label);
  r.adv_e_label = std::exp(r.adv_at_label - top);
  r.adv_e_rival = std::exp((first == r.label ? value_of(best[1]) : top) - top);
  if constexpr (count == 2) {
    r.clean_at_label = logit_at(source[1], r.label);
    r.clean_e_label = std::exp(r.clean_at_label - clean_top);
    r.clean_e_rival = std::exp(logit_at(source[1], r.rival) - clean_top);
  }
  r.weight = s.weight != nullptr ? s.weight[n] : 1.0f;

  const float scale = 1 / r.adv.total(), log_total = r.adv.log_total();
  const float clean_scale = 1 / r.clean.total(), clean_log_total = r.clean.log_total();
  const auto log_ratio = [&](float z, float clean_z) {
    if (boosted) {
      const float floored = std::exp(z - top) * scale + static_cast<float>(rows::kMartLog);
      return (clean_z - clean_top - clean_log_total) - std::log(floored);
    }
    return ((clean_z - clean_top) - (z - top)) - (clean_log_total - log_total);
  };
  if constexpr (count == 2) {
    float divergence = 0, missing = 0;
    both.each([&](int, const auto& z) {
      const float p = std::exp(z[1] - clean_top) * clean_scale;
      divergence += p == 0 ? 0.0f : p * log_ratio(z[0], z[1]);
      if (boosted) {
        missing += p * rows::missing_share(std::exp(z[0] - top) * scale);
      }
    });
    r.divergence = team.sum(divergence);
    r.missing = team.sum(missing);
  }

  const rows::LossPlan<float> plan = rows::plan_loss(o, r);
  if (!active) {
    return;
  }
  if (team.rank() == 0) {
    s.loss[n] = plan.loss;
  }
  both.put(results, [&](int k, const auto& z, auto& result) {
    const float q = std::exp(z[0] - top) * scale;
    float x = plan.own * q + plan.uniform;
    if constexpr (count == 2) {
      const float p = std::exp(z[1] - clean_top) * clean_scale;
      float difference = q - p;
      if (boosted) {
        difference += p * rows::missing_share(q);
      }
      x += plan.pull * difference;
      const float pulled = p == 0 ? 0.0f : p * (log_ratio(z[0], z[1]) - plan.divergence);
      result[1] = k == plan.clean_place
                      ? plan.clean_value
                      : plan.clean_pull * pulled + plan.clean_own * p + plan.clean_uniform;
    }
    EMR_UNROLL for (int j = 0; j < plan.kPlaces; ++j) {
      x = k == plan.places[j] ? plan.values[j] : x;
    }
    result[0] = x;
  });
}

}  // namespace emr::cuda
