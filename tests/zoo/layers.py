"""Multilayer perceptrons, and one small net around each activation, normalisation, convolution and pool."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import CLASSES, Entry, Lambda


def mlp(*, norm: bool = False, bias: bool = True) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten()]
    for a, b in ((12, 10), (10, 8)):
        parts += [nn.Linear(a, b, bias=bias), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(8, CLASSES, bias=bias))


def with_activation(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Convolution, BatchNorm, activation, convolution, activation, linear."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        make(),
        nn.Conv2d(6, 6, 3),
        make(),
        nn.Flatten(),
        nn.Linear(6 * 16, CLASSES),
    )


def with_norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Two normalisations of [N, 6, 6, 6], one before a ReLU and one after."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        make(),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        make(),
        nn.Flatten(),
        nn.Linear(6 * 36, CLASSES),
    )


def with_conv(make: Callable[[], nn.Module], norm: type[nn.Module] = nn.BatchNorm2d) -> Callable[[], nn.Module]:
    """A stem to 6 channels, the convolution under test (to 6 channels) between ReLUs, global mean, linear."""
    rank = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[norm]  # type: ignore[index]
    stem = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    return lambda: nn.Sequential(
        stem(3, 6, 3, padding=1),
        norm(6),
        nn.ReLU(),
        make(),
        norm(6),
        nn.ReLU(),
        Lambda(lambda h: h.mean(dim=tuple(range(2, h.dim())))),
        nn.Linear(6, CLASSES),
    )


def with_pool(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        make(),
        nn.ReLU(),
        nn.Conv2d(5, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, CLASSES),
    )


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 18)
        self.b = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).unflatten(1, (6, 3)).amax(dim=2))


def separable() -> nn.Module:
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 6, 1))


def _plain(entry_id: str, build: Callable[[], nn.Module], shape: tuple[int, ...] = (3, 6, 6)) -> Entry:
    return Entry(entry_id, build, shape, piecewise_linear=True)


ENTRIES = [
    Entry("linear", lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)), (12,), piecewise_linear=True),
    Entry("mlp", mlp, (12,), piecewise_linear=True, layers=("1", "3", "5")),
    Entry("mlp_batchnorm", lambda: mlp(norm=True), (3, 2, 2), piecewise_linear=True, layers=("2", "4", "7")),
    Entry("mlp_no_bias", lambda: mlp(bias=False), (12,), piecewise_linear=True),
    _plain("maxout", Maxout, (12,)),
    # Activations: piecewise linear.
    _plain("act_relu", with_activation(nn.ReLU)),
    _plain("act_relu_inplace", with_activation(lambda: nn.ReLU(inplace=True))),
    _plain("act_relu_functional_inplace", with_activation(lambda: Lambda(lambda h: F.relu_(h)))),
    _plain("act_leaky_relu", with_activation(lambda: nn.LeakyReLU(0.1))),
    _plain("act_leaky_relu_inplace", with_activation(lambda: nn.LeakyReLU(0.2, inplace=True))),
    _plain("act_leaky_relu_negative_slope", with_activation(lambda: nn.LeakyReLU(-0.3))),
    _plain("act_prelu_single", with_activation(nn.PReLU)),
    _plain("act_prelu_per_channel", with_activation(lambda: nn.PReLU(6))),
    _plain("act_relu6", with_activation(nn.ReLU6)),
    _plain("act_hardtanh", with_activation(lambda: nn.Hardtanh(-0.4, 0.6))),
    _plain("act_threshold", with_activation(lambda: nn.Threshold(0.1, -0.2))),
    _plain("act_rrelu", with_activation(nn.RReLU)),
    _plain("act_abs_clamp", with_activation(lambda: Lambda(lambda h: h.abs().clamp(max=0.7) - h.clamp_min(0.2)))),
    # Activations: curved.
    Entry("act_silu", with_activation(nn.SiLU), (3, 6, 6), layers=("1", "3")),
    Entry("act_silu_inplace", with_activation(lambda: nn.SiLU(inplace=True)), (3, 6, 6)),
    Entry("act_gelu", with_activation(nn.GELU), (3, 6, 6)),
    Entry("act_gelu_tanh", with_activation(lambda: nn.GELU("tanh")), (3, 6, 6)),
    Entry("act_softplus", with_activation(lambda: nn.Softplus(beta=2.0, threshold=1.5)), (3, 6, 6)),
    Entry("act_elu", with_activation(lambda: nn.ELU(0.7)), (3, 6, 6)),
    Entry("act_selu", with_activation(nn.SELU), (3, 6, 6)),
    Entry("act_celu", with_activation(lambda: nn.CELU(1.3)), (3, 6, 6)),
    Entry("act_sigmoid", with_activation(nn.Sigmoid), (3, 6, 6)),
    Entry("act_tanh", with_activation(nn.Tanh), (3, 6, 6)),
    Entry("act_mish", with_activation(nn.Mish), (3, 6, 6)),
    Entry("act_hardswish", with_activation(nn.Hardswish), (3, 6, 6)),
    Entry(
        "act_hardsigmoid",
        with_activation(nn.Hardsigmoid),
        (3, 6, 6),
        reference_build=with_activation(lambda: Lambda(lambda h: F.relu6(h + 3) / 6)),
        piecewise_linear=True,
    ),
    Entry("act_softsign", with_activation(nn.Softsign), (3, 6, 6)),
    Entry("act_logsigmoid", with_activation(nn.LogSigmoid), (3, 6, 6)),
    Entry("act_channel_softmax", with_activation(lambda: nn.Softmax(dim=1)), (3, 6, 6)),
    # Normalisations.
    Entry("norm_group", with_norm(lambda: nn.GroupNorm(2, 6)), (3, 6, 6), layers=("1", "3")),
    Entry("norm_layer", with_norm(lambda: nn.LayerNorm((6, 6, 6))), (3, 6, 6)),
    Entry("norm_layer_no_affine", with_norm(lambda: nn.LayerNorm(6, elementwise_affine=False)), (3, 6, 6)),
    Entry("norm_instance", with_norm(lambda: nn.InstanceNorm2d(6, affine=True)), (3, 6, 6)),
    _plain("norm_instance_tracked", with_norm(lambda: nn.InstanceNorm2d(6, track_running_stats=True))),
    Entry("norm_rms", with_norm(lambda: nn.RMSNorm(6)), (3, 6, 6)),
    Entry("norm_local_response", with_norm(lambda: nn.LocalResponseNorm(3)), (3, 6, 6)),
    _plain("norm_batch_no_affine", with_norm(lambda: nn.BatchNorm2d(6, affine=False))),
    Entry("norm_batch_statistics", with_norm(lambda: nn.BatchNorm2d(6, track_running_stats=False)), (3, 6, 6)),
    # Convolutions.
    _plain("conv_depthwise", with_conv(lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6))),
    _plain("conv_separable", with_conv(separable)),
    _plain("conv_grouped", with_conv(lambda: nn.Conv2d(6, 6, 3, groups=3, padding=1))),
    _plain("conv_dilated", with_conv(lambda: nn.Conv2d(6, 6, 3, dilation=2, padding=2)), (3, 7, 7)),
    _plain("conv_strided", with_conv(lambda: nn.Conv2d(6, 6, 3, stride=2)), (3, 8, 8)),
    _plain("conv_uneven", with_conv(lambda: nn.Conv2d(6, 6, (3, 2), stride=(2, 1), padding=(0, 1))), (3, 8, 5)),
    _plain("conv_same", with_conv(lambda: nn.Conv2d(6, 6, 4, padding="same"))),
    _plain("conv_circular", with_conv(lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"))),
    _plain("conv_reflect", with_conv(lambda: nn.Conv2d(6, 6, 3, padding=2, padding_mode="reflect"))),
    _plain("conv_replicate", with_conv(lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="replicate"))),
    _plain("conv_1d", with_conv(lambda: nn.Conv1d(6, 6, 3, stride=2), nn.BatchNorm1d), (3, 11)),
    _plain("conv_3d", with_conv(lambda: nn.Conv3d(6, 6, (3, 1, 2)), nn.BatchNorm3d), (3, 4, 4, 4)),
    _plain("conv_transposed", with_conv(lambda: nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1)), (3, 4, 4)),
    _plain(
        "conv_transposed_grouped",
        with_conv(lambda: nn.ConvTranspose2d(6, 6, 3, 2, output_padding=1, groups=2, dilation=2, bias=False)),
        (3, 4, 4),
    ),
    _plain("conv_transposed_1d", with_conv(lambda: nn.ConvTranspose1d(6, 6, 4, stride=3), nn.BatchNorm1d), (3, 5)),
    _plain("conv_transposed_3d", with_conv(lambda: nn.ConvTranspose3d(6, 6, 2), nn.BatchNorm3d), (3, 3, 3, 3)),
    # Pools.
    _plain("pool_max", with_pool(lambda: nn.MaxPool2d(2))),
    _plain("pool_max_overlapping", with_pool(lambda: nn.MaxPool2d(3, stride=2, padding=1)), (3, 7, 7)),
    _plain("pool_max_ceil_dilated", with_pool(lambda: nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True)), (3, 8, 8)),
    _plain("pool_avg", with_pool(lambda: nn.AvgPool2d(2))),
    _plain(
        "pool_avg_padded",
        with_pool(lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False)),
        (3, 8, 7),
    ),
    _plain("pool_adaptive_avg", with_pool(lambda: nn.AdaptiveAvgPool2d((4, 3))), (3, 7, 7)),
    _plain("pool_adaptive_max", with_pool(lambda: nn.AdaptiveMaxPool2d((4, 3))), (3, 7, 7)),
    Entry("pool_lp", with_pool(lambda: nn.Sequential(nn.Softplus(), nn.LPPool2d(3, 2))), (3, 6, 6)),
]
