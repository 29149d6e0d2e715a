"""Attention and recurrence: written out, PyTorch's own modules, fused, shared cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import CLASSES, Entry


class Attention(nn.Module):
    """Softmax attention written out, or through the fused function."""

    def __init__(self, dim: int, heads: int, fused: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.causal = heads, fused, causal
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            out = ((q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, length, dim))


class ViT(nn.Module):
    """Patch embedding, class token, position embedding, pre-norm blocks, head on the class token."""

    def __init__(self, dim: int = 8, depth: int = 2, fused: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, stride=4)
        self.cls = nn.Parameter(0.5 * torch.randn(1, 1, dim))
        self.pos = nn.Parameter(0.5 * torch.randn(1, 5, dim))
        self.attn = nn.ModuleList(Attention(dim, 2, fused, causal) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1))
        self.head = nn.Linear(dim, CLASSES)
        self.readout = -1 if causal else 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(h.shape[0], -1, -1), h], dim=1) + self.pos
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            h = h + attn(self.norms[2 * i](h))
            h = h + mlp(self.norms[2 * i + 1](h))
        return self.head(self.norms[-1](h)[:, self.readout])


class SelfAttention(nn.Module):
    """nn.MultiheadAttention over the rows of the image, with or without its averaged weights as output."""

    def __init__(self, need_weights: bool, masked: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(8, CLASSES)
        self.need_weights, self.masked = need_weights, masked

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        mask = torch.triu(h.new_full((x.shape[1], x.shape[1]), float("-inf")), 1) if self.masked else None
        out, weights = self.attn(h, h, h, need_weights=self.need_weights, attn_mask=mask)
        if weights is not None:
            out = out * (1 + weights.diagonal(dim1=1, dim2=2).unsqueeze(2))
        return self.head(out.mean(1))


class Calls(nn.Module):
    """Attention called in every other way: learned queries, masks with a row that sees nothing, a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.queries = nn.Parameter(torch.randn(1, 1, 3, 4))
        mask = torch.rand(4, 4) > 0.4
        mask[2] = False
        self.register_buffer("mask", mask)
        self.register_buffer("shift", torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        heads = h.unflatten(2, (2, 4)).transpose(1, 2)
        one = heads.mean(1, keepdim=True)
        outputs = [
            F.scaled_dot_product_attention(heads, heads * 0.5, heads.tanh(), attn_mask=self.mask),
            F.scaled_dot_product_attention(heads.sin(), heads * 2, heads + 1, attn_mask=self.shift, scale=0.3),
            F.scaled_dot_product_attention(heads * 3, one.cos(), one * 2),
            F.scaled_dot_product_attention(heads[:, :, :2], heads.exp(), heads * 2, is_causal=True),
            F.scaled_dot_product_attention(heads, heads, heads),
            F.scaled_dot_product_attention(self.queries, heads.tanh(), heads * 2),
            F.scaled_dot_product_attention(heads * 2, heads.tanh(), self.shift.expand(h.shape[0], 2, 4, 4)),
        ]
        pooled = torch.stack([o.mean(2).expand(h.shape[0], -1, -1).flatten(1) for o in outputs]).sum(0)
        return self.head(pooled)


class Written(nn.Module):
    """Attention written out in six ways that are one call, and five that only look like it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = h * 1.5, h.tanh(), h.sin()
        heads = [t.unflatten(2, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        grouped = [t.reshape(-1, 2, 4) for t in (q, k, v)]
        outputs = [
            torch.softmax(q @ k.transpose(1, 2), 2) @ v,
            self.drop(torch.softmax(q @ k.transpose(-1, -2) / 3, -1)) @ v,
            torch.softmax(heads[0] @ heads[1].transpose(2, 3) * 0.5 / 2.0, -1) @ heads[2],
            torch.bmm(torch.softmax(torch.bmm(grouped[0], grouped[1].transpose(1, 2)), -1), grouped[2]),
            torch.softmax(h @ h.mT * 2, -1) @ h,
            torch.softmax(q[:, :2] @ k[:, 1:].mT, -1) @ v[:, 1:].repeat(1, 1, 2),
            # Another extent, another factor, no transposition, one batch for all; and, below, probabilities read twice.
            torch.softmax(q @ k.transpose(1, 2), 1) @ v,
            torch.softmax(q @ k.mT * h[:, :1, :1], -1) @ v,
            torch.softmax(q[:, :, :4] @ v, -1) @ h.mT,
            torch.softmax(q @ k[:1].transpose(1, 2), -1) @ v,
        ]
        weights = torch.softmax(q @ k.mT, -1)
        outputs += [weights @ v, weights.square()]
        return self.head(torch.stack([o.reshape(h.shape[0], -1).cumsum(1)[:, :8] for o in outputs]).sum(0))


class Products(nn.Module):
    """Matrix products of activations, parameters and constants in all shapes, and softmax along any extent."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.right, self.left = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 4))
        self.column, self.row = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(4))
        self.batch = nn.Parameter(torch.randn(2, 1, 8, 5))
        self.register_buffer("fixed", torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        weights = torch.softmax(h @ h.transpose(1, 2), 1)
        mixed = weights @ (self.left @ h @ self.right) @ self.fixed
        mixed = mixed + (h @ self.column).unsqueeze(2) + (self.row @ h).unsqueeze(1)
        mixed = mixed + (h @ self.batch).mean((0, 3)).unsqueeze(2) + (h * h) @ (h.mean(1).softmax(-1)[0] * self.fixed)
        mixed = mixed + (h[:, 0] @ h[:, 1].T).sum(1)[:, None, None] * 0.1 + h[0, 0] @ h[0, 1]
        single = F.layer_norm(mixed, (4, 8), self.batch[0, 0, :4].sum(1).expand(8, 4).T, None)
        return self.head(F.layer_norm(single.mean(1), (8,), None, self.column).softmax(0))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer between an embedding and a head."""

    def __init__(self, frozen: bool = False, depth: int = 1, **options: object) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)  # type: ignore[arg-type]
        self.encoder = layer if depth == 1 else nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)
        if frozen:
            self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(dim=1))


class UnrolledRNN(nn.Module):
    """An Elman cell applied to every row with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.hidden, self.out = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 7)
        for row in x.unbind(dim=1):
            h = torch.tanh(self.inp(row) + self.hidden(h))
        return self.out(h)


class Recurrent(nn.Module):
    """PyTorch's recurrent modules, whole or as a cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.out = cell, nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.cell, nn.GRUCell):
            h = x.new_zeros(x.shape[0], 7)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            return self.out(h)
        return self.out(self.cell(x)[0][:, -1])


ENTRIES = [
    Entry("vit", ViT, (3, 8, 8), layers=("attn.0", "mlp.1", "head")),
    Entry("vit_fused_attention", lambda: ViT(fused=True), (3, 8, 8)),
    Entry("vit_causal_attention", lambda: ViT(fused=True, causal=True), (3, 8, 8)),
    Entry("multihead_attention", lambda: SelfAttention(False), (4, 6)),
    Entry("multihead_attention_weights", lambda: SelfAttention(True), (4, 6)),
    Entry("multihead_attention_masked", lambda: SelfAttention(False, masked=True), (4, 6)),
    Entry("attention_calls", Calls, (4, 6)),
    Entry("attention_written_out", Written, (4, 6)),
    Entry("matrix_products", Products, (4, 6), any_batch=False),
    Entry("transformer_encoder_layer", Encoder, (4, 6)),
    Entry("transformer_encoder_layer_prenorm", lambda: Encoder(norm_first=True, activation="gelu"), (4, 6)),
    Entry("transformer_encoder", lambda: Encoder(depth=2), (4, 6)),
    Entry("transformer_encoder_layer_frozen", lambda: Encoder(frozen=True), (4, 6)),
    Entry("rnn_unrolled", UnrolledRNN, (4, 6)),
    Entry("gru_cell", lambda: Recurrent(nn.GRUCell(6, 7)), (4, 6), engine="any"),
    Entry("lstm", lambda: Recurrent(nn.LSTM(6, 7, batch_first=True)), (4, 6), engine="any"),
]
