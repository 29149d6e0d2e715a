// Registers the compiled kernels; the operators themselves are defined in Python.
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(emr, CPU, m) {
  m.impl("affine_relu", TORCH_BOX(&emr::cpu::affine_relu));
  m.impl("affine_relu_out", TORCH_BOX(&emr::cpu::affine_relu_out));
  m.impl("affine_relu_vjp", TORCH_BOX(&emr::cpu::affine_relu_vjp));
  m.impl("affine_relu_vjp_out", TORCH_BOX(&emr::cpu::affine_relu_vjp_out));
  m.impl("affine_relu_jvp", TORCH_BOX(&emr::cpu::affine_relu_jvp));
  m.impl("affine_relu_jvp_out", TORCH_BOX(&emr::cpu::affine_relu_jvp_out));
  m.impl("pack_bits", TORCH_BOX(&emr::cpu::pack_bits));
}
