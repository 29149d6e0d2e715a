"""Triton kernels: the GPU path that needs no compiler. Importing this imports Triton, so it happens on demand only.

Each file holds the kernels of one operator, its launchers, which take the operator's arguments, and the `examples` that
`check` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emr_kernels.triton.affine_relu import affine_relu, affine_relu_out, affine_relu_vjp, affine_relu_vjp_out
from emr_kernels.triton.affine_relu_jvp import affine_relu_jvp, affine_relu_jvp_out
from emr_kernels.triton.bits import pack_bits
from emr_kernels.triton.logit_seeds import logit_seeds
from emr_kernels.triton.masked_chain import masked_chain, masked_chain_sq_norms
from emr_kernels.triton.masked_gemm import masked_gemm, masked_gemm_out, masked_gemm_sq_norms
from emr_kernels.triton.pairwise_margins import pairwise_margins
from emr_kernels.triton.pgd_start import pgd_start
from emr_kernels.triton.pgd_step import pgd_step, pgd_step_out
from emr_kernels.triton.robust_losses import robust_losses
from emr_kernels.triton.sq_norms import sq_norms

#: The launcher of each operator that has one, by the operator's name.
launchers: dict[str, Callable[..., Any]] = {
    "affine_relu": affine_relu,
    "affine_relu_jvp": affine_relu_jvp,
    "affine_relu_jvp_out": affine_relu_jvp_out,
    "affine_relu_out": affine_relu_out,
    "affine_relu_vjp": affine_relu_vjp,
    "affine_relu_vjp_out": affine_relu_vjp_out,
    "logit_seeds": logit_seeds,
    "masked_chain": masked_chain,
    "masked_chain_sq_norms": masked_chain_sq_norms,
    "masked_gemm": masked_gemm,
    "masked_gemm_out": masked_gemm_out,
    "masked_gemm_sq_norms": masked_gemm_sq_norms,
    "pack_bits": pack_bits,
    "pairwise_margins": pairwise_margins,
    "pgd_start": pgd_start,
    "pgd_step": pgd_step,
    "pgd_step_out": pgd_step_out,
    "robust_losses": robust_losses,
    "sq_norms": sq_norms,
}
