"""Fused elementwise operators of the engine, each with a plain-PyTorch reference and faster backends."""

from __future__ import annotations

from emr_kernels.ops._format import dense_format
from emr_kernels.ops.affine_relu import affine_relu, affine_relu_jvp, affine_relu_vjp
from emr_kernels.ops.bits import pack_bits, unpack_bits
from emr_kernels.ops.logit_seeds import LogitSeeds, logit_seeds
from emr_kernels.ops.masked_chain import masked_chain, masked_chain_sq_norms
from emr_kernels.ops.masked_gemm import masked_gemm, masked_gemm_sq_norms
from emr_kernels.ops.pairwise_margins import pairwise_margins
from emr_kernels.ops.patches import fold_patches
from emr_kernels.ops.pgd_start import pgd_start
from emr_kernels.ops.pgd_step import pgd_step
from emr_kernels.ops.robust_losses import robust_losses
from emr_kernels.ops.smooth import smooth_jvp, smooth_vjp
from emr_kernels.ops.sq_norms import sq_norms
from emr_kernels.ops.to_hyperplane import to_hyperplane
from emr_kernels.ops.windows import read_windows, write_windows
from emr_kernels.ops.winograd import winograd_convolution, winograd_weight, winograd_weight_grad

__all__ = [
    "LogitSeeds",
    "affine_relu",
    "affine_relu_jvp",
    "affine_relu_vjp",
    "dense_format",
    "fold_patches",
    "logit_seeds",
    "masked_chain",
    "masked_chain_sq_norms",
    "masked_gemm",
    "masked_gemm_sq_norms",
    "pack_bits",
    "pairwise_margins",
    "pgd_start",
    "pgd_step",
    "read_windows",
    "robust_losses",
    "smooth_jvp",
    "smooth_vjp",
    "sq_norms",
    "to_hyperplane",
    "unpack_bits",
    "winograd_convolution",
    "winograd_weight",
    "winograd_weight_grad",
    "write_windows",
]
