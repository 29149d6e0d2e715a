"""graph=True: the same numbers, from a CUDA graph where there is a CUDA device, and said so where there is none."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss, graphed
from emr_kernels.function import passes

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def gradients_of(penalty: EffectiveWeightPenalty, x: Tensor, y: Tensor) -> list[Tensor]:
    penalty.model.zero_grad()
    value = penalty(x, y)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in penalty.model.parameters() if p.grad is not None)]


def test_on_the_cpu_the_passes_run_without_a_graph() -> None:
    entry = zoo.get("mlp_batchnorm")
    model, (x, y) = entry.make(), entry.data()
    penalty = EffectiveWeightPenalty(model, graph=True)
    assert penalty.graph_reason == "not called yet"
    found = gradients_of(penalty, x, y)
    assert penalty.graph_reason == "x is on cpu; CUDA graphs are for CUDA devices"
    plain = EffectiveWeightPenalty(model)
    assert plain.graph_reason == "graph is False"
    for a, b in zip(found, gradients_of(plain, x, y), strict=True):
        assert torch.equal(a, b)


def test_bad_option() -> None:
    with pytest.raises(TypeError, match="graph is 1; expected True or False"):
        EMRLoss(nn.Linear(2, 2), graph=1)  # type: ignore[arg-type]


def test_copies_capture_their_own() -> None:
    penalty = EffectiveWeightPenalty(nn.Linear(2, 2), graph=True)
    for other in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert isinstance(other._graphs, graphed.GraphCache) and other._graphs is not penalty._graphs


class Replayed:
    """Stands in for a captured graph: recomputes the passes on the static tensors, and counts."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Replayed:
    """CUDA graphs acted out on the CPU: the same static tensors, keys and copies, replay by running again."""
    counts = Replayed()

    def capture(request, x, wanted, wants_x):  # type: ignore[no-untyped-def]
        counts.captures += 1
        inputs = [t.clone() for t in graphed._inputs(request, x)]
        static_x, *others = inputs
        static_y = None if request.y is None else others.pop(0)
        values = list(request.values)
        for index, static in zip(graphed._changing(request), others, strict=True):
            values[index] = static

        def run():  # type: ignore[no-untyped-def]
            again = graphed.Request(request.program, list(values), request.options, static_y, request.factor)
            return passes(again, static_x, wanted, wants_x)

        outcome = run()

        class Graph:
            def replay(self) -> None:
                counts.replays += 1
                for static, fresh in zip(outcome, run(), strict=True):
                    if static is not None:
                        static.copy_(fresh)

        return graphed._Captured(request.program, Graph(), inputs, outcome)

    monkeypatch.setattr(graphed, "_capture", capture)
    monkeypatch.setattr(graphed, "_reason_against", lambda x: None)
    return counts


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "weight_norm", "vit"])
def test_replays_see_new_inputs_and_new_weights(entry_id: str, stand_in: Replayed) -> None:
    entry = zoo.get(entry_id)
    model, (x, y) = entry.make(), entry.data()
    graph, plain = EffectiveWeightPenalty(model, graph=True), EffectiveWeightPenalty(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in range(3):
        batch = x + 0.01 * call
        expected = gradients_of(plain, batch, y)
        found = gradients_of(graph, batch, y)
        assert graph.graph_reason is None
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        optimizer.step()
    assert (stand_in.captures, stand_in.replays) == (1, 3)


def test_what_makes_a_new_graph(stand_in: Replayed) -> None:
    entry = zoo.get("mlp_batchnorm")
    model, (x, y) = entry.make(), entry.data(6)
    penalty = EffectiveWeightPenalty(model, graph=True)
    for batch in (x, x[:4], x):
        penalty(batch, y[: len(batch)]).backward()
    assert stand_in.captures == 2
    first = next(model.parameters())
    first.data = first.data.clone()  # another address
    found = gradients_of(penalty, x, y)
    assert stand_in.captures == 3
    for a, b in zip(found, gradients_of(EffectiveWeightPenalty(model), x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for size in range(2, 7):
        penalty(x[:size], y[:size])
    assert penalty._graphs is not None and len(penalty._graphs._captured) <= graphed.CAPACITY


def test_a_failed_capture_is_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch, stand_in: Replayed) -> None:
    tries = []

    def capture(*args: object) -> None:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphed, "_capture", capture)
    entry = zoo.get("mlp_batchnorm")
    model, (x, y) = entry.make(), entry.data()
    penalty = EffectiveWeightPenalty(model, graph=True)
    expected = gradients_of(EffectiveWeightPenalty(model), x, y)
    for _ in range(2):
        for a, b in zip(gradients_of(penalty, x, y), expected, strict=True):
            assert torch.equal(a, b)
    assert len(tries) == 1
    assert penalty.graph_reason == "capture failed: operation not permitted when stream is capturing"


@pytest.mark.device
@needs_cuda
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "wrn_16_4", "weight_norm"])
def test_a_real_graph(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model = entry.make(torch.float32).cuda()
    x, y = (tensor.cuda() for tensor in entry.data(8, torch.float32))
    graph, plain = EffectiveWeightPenalty(model, graph=True), EffectiveWeightPenalty(model)
    for call in range(3):
        batch = x + 0.01 * call
        found, expected = gradients_of(graph, batch, y), gradients_of(plain, batch, y)
        assert graph.graph_reason is None
        for a, b in zip(found, expected, strict=True):
            # The same kernels on the same numbers; cuDNN may choose another algorithm while it captures.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
