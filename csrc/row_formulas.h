// logit_seeds and robust_losses: what one row's sums and largest logits make of it. Scalar, shared by CPU and GPU; the
// passes over the classes are theirs. A is float or double. Classes are int, -1 where there is none.
#pragma once

#include <cmath>

#include "formulas.h"

namespace emr::rows {

// Both in the order of KINDS in emr_kernels/ops.
enum class SeedKind { softmax, label, margin, ce, cw, dlr, ce_targeted, dlr_targeted };
enum class LossKind { ce, kl, trades, mart };

inline constexpr double kDlrFloor = 1e-12;
// MART's log(1.0001 - p + 1e-12), log(p + 1e-12) and 1.0000001 - p; MAIL's factor of the sigmoid.
inline constexpr double kMartCross = 1e-4, kMartLog = 1e-12, kMartWeight = 1e-7;
inline constexpr double kMailScale = 3;

template <class A>
EMR_HOST_DEVICE static inline A log_one_plus(A x) {
  return std::log1p(x);
}

// How many of a row's largest logits a kind looks at.
EMR_HOST_DEVICE static inline int ranks_of(SeedKind kind) {
  return kind == SeedKind::dlr || kind == SeedKind::dlr_targeted ? 4 : 2;
}

EMR_HOST_DEVICE static inline int least_classes(SeedKind kind) {
  return kind == SeedKind::dlr_targeted ? 4 : kind == SeedKind::dlr ? 3 : 2;
}

// Whether a seed has a part in every class.
EMR_HOST_DEVICE static inline bool is_dense(SeedKind kind) {
  return kind == SeedKind::softmax || kind == SeedKind::ce || kind == SeedKind::ce_targeted;
}

// Softmax of one row: e_k = exp(z_k - top), and their sum without the first largest, which is 1. So 1 - p keeps its last
// bits where one class has nearly everything. A row whose largest is not finite has a rest of NaN.
template <class A>
struct RowSoftmax {
  A top;
  A rest;
  int place;  // of the first largest

  EMR_HOST_DEVICE A total() const { return 1 + rest; }
  EMR_HOST_DEVICE A log_total() const { return log_one_plus(rest); }
  EMR_HOST_DEVICE A complement(int k, A e) const { return k == place ? rest / total() : 1 - e / total(); }
  EMR_HOST_DEVICE A log_p(A z) const { return (z - top) - log_total(); }
};

// What a row's seed is made of.
template <class A>
struct SeedRow {
  A ranked[4];    // the largest logits, falling; among equals the first class first
  int places[4];  // their classes
  A rest;             // of exp(z - top), see RowSoftmax
  A mixed_rest;       // of exp((z - top) / T), for softmax
  A mixed;            // the sum of exp((z - top) / T) * z, for softmax
  A sum;              // the sum of z, where seeds are centred
  int label, target;
  A at_label, at_target;         // logits
  A e_label, e_target, e_rival;  // exp(z - top)

  // Without an index that is known at run time only: on a GPU the arrays then stay in registers.
  EMR_HOST_DEVICE int rival() const { return places[0] == label ? places[1] : places[0]; }
  EMR_HOST_DEVICE A at_rival() const { return places[0] == label ? ranked[1] : ranked[0]; }
};

// seed_k = exp(...)_k * factor + shift; then values[0] at places[0] instead if `replace`, and every other value added.
template <class A>
struct SeedPlan {
  static constexpr int kPlaces = 5;
  A loss, margin, probability_margin;
  int runner_up;
  A factor, shift;
  bool replace;
  int places[kPlaces];
  A values[kPlaces];

  EMR_HOST_DEVICE void set(int slot, int place, A value) {
    places[slot] = place;
    values[slot] = value;
  }
};

template <class A>
EMR_HOST_DEVICE static inline SeedPlan<A> plan_seed(SeedKind kind, const SeedRow<A>& r, int classes, bool center) {
  const A at_rival = r.at_rival();
  const RowSoftmax<A> soft{r.ranked[0], r.rest, r.places[0]};
  const A total = soft.total();
  SeedPlan<A> plan{};
  for (int slot = 0; slot < SeedPlan<A>::kPlaces; ++slot) {
    plan.places[slot] = -1;
  }
  plan.runner_up = r.rival();
  plan.margin = r.at_label - at_rival;
  plan.probability_margin = r.e_label / total - r.e_rival / total;
  switch (kind) {
    case SeedKind::softmax:
    case SeedKind::label:
      if (kind == SeedKind::softmax) {
        plan.factor = 1 / (1 + r.mixed_rest);
        plan.loss = r.mixed * plan.factor;
      } else {
        plan.set(0, r.label, 1);
        plan.loss = r.at_label;
      }
      if (center) {
        plan.shift = A(-1) / static_cast<A>(classes);
        plan.loss += r.sum * plan.shift;
      }
      break;
    case SeedKind::margin:
      plan.set(0, r.label, 1);
      plan.set(1, plan.runner_up, -1);
      plan.loss = plan.margin;
      break;
    case SeedKind::cw:
      plan.set(0, r.label, -1);
      plan.set(1, plan.runner_up, 1);
      plan.loss = -plan.margin;
      break;
    case SeedKind::ce:
      plan.factor = 1 / total;
      plan.replace = true;
      plan.set(0, r.label, -soft.complement(r.label, r.e_label));
      plan.loss = -soft.log_p(r.at_label);
      break;
    case SeedKind::ce_targeted:
      plan.factor = -1 / total;
      plan.replace = true;
      plan.set(0, r.target, soft.complement(r.target, r.e_target));
      plan.loss = soft.log_p(r.at_target);
      break;
    case SeedKind::dlr:
    case SeedKind::dlr_targeted: {
      const bool targeted = kind == SeedKind::dlr_targeted;
      const A low = targeted ? (r.ranked[2] + r.ranked[3]) / 2 : r.ranked[2];
      const A width = r.ranked[0] - low + A(kDlrFloor);
      const A ratio = (r.at_label - (targeted ? r.at_target : at_rival)) / width;
      const A slope = ratio / width;
      plan.set(0, r.label, -1 / width);
      plan.set(1, targeted ? r.target : plan.runner_up, 1 / width);
      plan.set(2, r.places[0], slope);
      plan.set(3, r.places[2], targeted ? slope * A(-0.5) : -slope);
      if (targeted) {
        plan.set(4, r.places[3], slope * A(-0.5));
      }
      plan.loss = -ratio;
      break;
    }
  }
  return plan;
}

struct LossOptions {
  LossKind kind;
  double beta;
  double smoothing;
  bool mail;
  double slope;
  double bias;
  int classes;

  EMR_HOST_DEVICE bool boosted() const { return kind == LossKind::mart; }
  // Whether there is a cross-entropy on the adversarial or on the clean logits; whether there are clean logits.
  EMR_HOST_DEVICE bool on_adversarial() const { return kind == LossKind::ce || kind == LossKind::mart; }
  EMR_HOST_DEVICE bool on_clean() const { return kind == LossKind::trades; }
  EMR_HOST_DEVICE bool has_clean() const { return kind != LossKind::ce; }
};

// What a row's loss is made of. Exponentials are e of RowSoftmax; those of the rival are of MART and MAIL.
template <class A>
struct LossRow {
  RowSoftmax<A> adv, clean;
  int label, rival;
  A adv_e_label, adv_e_rival, clean_e_label, clean_e_rival;
  A adv_at_label, clean_at_label;  // logits
  A weight;                        // the caller's
  A spread;                        // the sum of top - z over the smoothed cross-entropy's logits
  A divergence;                    // K
  A missing;                       // the sum of p_k * u_k, u_k = 1e-12 / (p'_k + 1e-12), for MART
};

// Per class, with p' and p the two softmaxes and d the difference of their logarithms:
//   adversarial  pull * (p' - p + p * u) + own * p' + uniform
//   clean        clean_pull * p * (d - divergence) + clean_own * p + clean_uniform
// and other values at a few places, where differences of nearly equal numbers want care.
template <class A>
struct LossPlan {
  A loss;
  A pull, own, uniform;
  A clean_pull, clean_own, clean_uniform;
  A divergence;
  static constexpr int kPlaces = 3;
  int places[kPlaces];
  A values[kPlaces];
  int clean_place;
  A clean_value;
};

template <class A>
EMR_HOST_DEVICE static inline A missing_share(A p) {
  return A(kMartLog) / (p + A(kMartLog));
}

template <class A>
EMR_HOST_DEVICE static inline LossPlan<A> plan_loss(const LossOptions& o, const LossRow<A>& r) {
  LossPlan<A> plan{};
  const A adv_scale = 1 / r.adv.total();
  const A p_rival = r.adv_e_rival * adv_scale, p_label = r.adv_e_label * adv_scale;
  A weight = r.weight;
  if (o.mail) {
    const A t = A(o.slope) * ((p_rival - p_label) + A(o.bias));
    weight *= A(kMailScale) / (1 + std::exp(-t));
  }
  const A smoothing = A(o.smoothing), uniform = smoothing / static_cast<A>(o.classes);

  // The cross-entropy, plain, smoothed or boosted, on either logits.
  const RowSoftmax<A>& soft = o.on_clean() ? r.clean : r.adv;
  A cross = -soft.log_p(o.on_clean() ? r.clean_at_label : r.adv_at_label);
  if (smoothing != 0) {
    cross = (1 - smoothing) * cross + uniform * r.spread + smoothing * soft.log_total();
  }
  A ratio = 0;
  if (o.boosted()) {
    const A room = r.adv.complement(r.rival, r.adv_e_rival) + A(kMartCross + kMartLog);
    ratio = p_rival / room;
    cross -= std::log(room);
  }

  // What multiplies the divergence.
  const A clean_scale = o.has_clean() ? 1 / r.clean.total() : A(0);
  const A clean_p_label = r.clean_e_label * clean_scale;
  const A clean_rest_label = r.clean.complement(r.label, r.clean_e_label);
  A share = 0;
  if (o.kind == LossKind::kl) {
    share = weight;
  } else if (o.kind == LossKind::trades) {
    share = A(o.beta) * weight;
  } else if (o.boosted()) {
    share = A(o.beta) * (clean_rest_label + A(kMartWeight));
  }
  plan.divergence = r.divergence;
  plan.loss = o.has_clean() ? share * r.divergence : A(0);
  if (o.on_adversarial()) {
    plan.loss += weight * cross;
  } else if (o.on_clean()) {
    plan.loss += cross;
  }

  const A outer = o.on_adversarial() ? weight : A(0);
  const A lost = share * r.missing;
  plan.pull = share;
  plan.own = outer * (1 - ratio) - lost;
  plan.uniform = o.on_adversarial() ? -(outer * uniform) : A(0);
  const auto gradient_at = [&](int k, A adv_e, A clean_e) {
    const A p = adv_e * adv_scale, rest = r.adv.complement(k, adv_e), clean_p = clean_e * clean_scale;
    const bool first_in_both = k == r.adv.place && k == r.clean.place;
    A difference = first_in_both ? r.clean.complement(k, clean_e) - rest : p - clean_p;
    if (o.boosted()) {
      difference += clean_p * missing_share(p);
    }
    A own = outer * (1 - ratio) * p;
    if (o.on_adversarial() && k == r.label) {
      own = outer * ((smoothing - rest) - ratio * p);
    } else if (o.boosted() && k == r.rival) {
      own = outer * (p + ratio * rest);
    }
    return (o.has_clean() ? share * difference : A(0)) + own - lost * p + plan.uniform;
  };
  plan.places[0] = o.on_adversarial() ? r.label : -1;
  plan.places[1] = o.boosted() ? r.rival : -1;
  plan.places[2] = o.has_clean() && r.adv.place == r.clean.place ? r.adv.place : -1;
  plan.values[0] = gradient_at(r.label, r.adv_e_label, r.clean_e_label);
  plan.values[1] = gradient_at(r.rival, r.adv_e_rival, r.clean_e_rival);
  plan.values[2] = gradient_at(r.adv.place, A(1), A(1));

  plan.clean_place = -1;
  if (o.has_clean()) {
    plan.clean_pull = share;
    if (o.kind != LossKind::kl) {
      plan.clean_own = o.boosted() ? A(o.beta) * r.divergence * clean_p_label : A(1);
      plan.clean_uniform = o.on_clean() ? -uniform : A(0);
      const A log_q = o.boosted() ? std::log(p_label + A(kMartLog)) : r.adv.log_p(r.adv_at_label);
      const A d = r.clean.log_p(r.clean_at_label) - log_q;
      const A pulled = clean_p_label == 0 ? A(0) : clean_p_label * (d - r.divergence);
      plan.clean_place = r.label;
      plan.clean_value =
          share * pulled + plan.clean_own * (smoothing - clean_rest_label) + plan.clean_uniform;
    }
  }
  return plan;
}

}  // namespace emr::rows
