// logit_seeds on the CPU.
#include "over_rows.h"

namespace emr::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logit_seeds(
    const Tensor& logits, const OptionalTensor& y, const OptionalTensor& target, const std::string& kind,
    double temperature, bool center) {
  const rows::SeedKind which = seed_kind(kind);
  check_logits(logits, rows::least_classes(which));
  const int64_t rows = logits.size(0), classes = logits.size(1);
  const ScalarType wide = compute_type(logits);
  Tensor seed = torch::stable::empty_like(logits);
  Tensor loss = torch::stable::new_empty(logits, {rows}, wide);
  Tensor margin = torch::stable::new_empty(logits, {rows}, wide);
  Tensor runner_up = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor probability_margin = torch::stable::new_empty(logits, {rows}, wide);
  const SeedTask task{
      logits.const_data_ptr(),
      checked_classes(y, logits),
      checked_classes(target, logits),
      seed.mutable_data_ptr(),
      loss.mutable_data_ptr(),
      margin.mutable_data_ptr(),
      probability_margin.mutable_data_ptr(),
      static_cast<int64_t*>(runner_up.mutable_data_ptr()),
      classes,
      which,
      temperature,
      center};
  over_rows(logits, [&](const RowKernels& kernels, int64_t begin, int64_t end, void* scratch) {
    kernels.seeds(task, begin, end, scratch);
  });
  return {std::move(seed), std::move(loss), std::move(margin), std::move(runner_up), std::move(probability_margin)};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("logit_seeds", TORCH_BOX(&emr::cpu::logit_seeds));
}
