// robust_losses on the CPU.
#include "over_rows.h"

namespace emr::cpu {

std::tuple<Tensor, Tensor, Tensor> robust_losses(
    const Tensor& adversarial, const OptionalTensor& clean, const OptionalTensor& y, const OptionalTensor& weights,
    const std::string& kind, double beta, double smoothing, bool mail, double slope, double bias) {
  check_logits(adversarial, 2);
  const int64_t rows = adversarial.size(0), classes = adversarial.size(1);
  const rows::LossOptions options{loss_kind(kind), beta, smoothing, mail, slope, bias, static_cast<int>(classes)};
  const ScalarType wide = compute_type(adversarial);
  check_loss_arguments(options, adversarial, clean, y, weights, wide);
  Tensor loss = torch::stable::new_empty(adversarial, {rows}, wide);
  Tensor grad = torch::stable::new_empty(adversarial, {rows, classes}, wide);
  Tensor clean_grad = clean ? torch::stable::new_empty(adversarial, {rows, classes}, wide)
                            : torch::stable::new_empty(adversarial, {0}, wide);
  const LossTask task{
      adversarial.const_data_ptr(),
      clean ? clean->const_data_ptr() : nullptr,
      checked_classes(y, adversarial),
      weights ? weights->const_data_ptr() : nullptr,
      loss.mutable_data_ptr(),
      grad.mutable_data_ptr(),
      clean_grad.mutable_data_ptr(),
      options};
  over_rows(adversarial, [&](const RowKernels& kernels, int64_t begin, int64_t end, void* scratch) {
    kernels.losses(task, begin, end, scratch);
  });
  return {std::move(loss), std::move(grad), std::move(clean_grad)};
}

}  // namespace emr::cpu

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("robust_losses", TORCH_BOX(&emr::cpu::robust_losses));
}
