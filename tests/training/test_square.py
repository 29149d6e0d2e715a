"""Square: its schedule and proposals, what it needs of a model, and that each image is on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import Square
from emr_training.attacks.balls import NORMS, Ball, distance
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.noise import Noise
from emr_training.attacks.problem import Problem
from emr_training.attacks.square import HALVINGS
from emr_training.attacks.windows import Bumps, Corners, Proposals, bump
from emr_training.data import Data

RADII = {"Linf": 0.12, "L2": 0.7, "L1": 3.0}


def correct(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


@pytest.mark.parametrize(
    ("size", "expected"),
    [(32, [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]), (28, [25, 18, 13, 9, 6, 4, 3, 2, 2, 1])],
)
def test_sides(size: int, expected: list[int]) -> None:
    attack = Square(0.1)
    corners = Corners(Ball("Linf", 0.1), torch.rand(1, 3, size, size), Noise(torch.arange(1)), 0)
    # The side changes in the iteration after each of these.
    assert [corners.side(attack.part(i)) for i in (0, *(i + 1 for i in HALVINGS))] == expected
    assert [corners.side(attack.part(i)) for i in HALVINGS] == expected[:-1]


def test_rescaled_schedule() -> None:
    attack = Square(0.1, p=0.05, queries=1000, rescale=True)
    assert [attack.part(i) for i in (0, 1, 2, 5, 6, 999)] == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.05 / 2**9]
    assert Square(0.1, p=0.05, queries=1000).part(999) == 0.05 / 2**4


def test_odd_sides_under_l2() -> None:
    bumps = Bumps(Ball("L2", 0.5), torch.rand(2, 1, 28, 28), Noise(torch.arange(2)), 0)
    assert [bumps.side(p) for p in (0.8, 0.4, 0.1, 0.001)] == [25, 19, 9, 3]
    tiny = Bumps(Ball("L2", 0.5), torch.rand(2, 1, 2, 9), Noise(torch.arange(2)), 0)
    assert tiny.side(0.8) == 2


def test_bump() -> None:
    # 5 x 5: a hill of 2 x 5 above a pit of 3 x 5. Rings count from the middle, row 1 and column 2.
    ring = torch.tensor([[2, 1, 1, 1, 2], [2, 1, 0, 1, 2], [2, 1, 1, 1, 2]], dtype=torch.float64)
    levels = torch.tensor([1 + 1 / 4 + 1 / 9, 1 / 4 + 1 / 9, 1 / 9], dtype=torch.float64)
    values = levels[ring.long()]
    hill, pit = values[:2] / values[:2].norm(), -values / values.norm()
    torch.testing.assert_close(bump(5, "L2"), torch.cat([hill, pit]) / 2**0.5)
    for side in (1, 2, 3, 9):
        torch.testing.assert_close(bump(side, "L2").norm(), torch.tensor(1.0, dtype=torch.float64))
        torch.testing.assert_close(bump(side, "L1").abs().sum(), torch.tensor(1.0, dtype=torch.float64))


def proposals_of(norm: str, n: int = 7) -> Proposals:
    x = torch.rand(n, 3, 11, 13, generator=torch.Generator().manual_seed(0))
    return (Corners if norm == "Linf" else Bumps)(Ball(norm, RADII[norm]), x, Noise(torch.arange(n)), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_proposals_stay_inside_and_change_one_window(norm: str) -> None:
    proposals = proposals_of(norm)
    noise, epsilon = Noise(torch.arange(7)), RADII[norm]
    columns, rows = set(), set()
    for step in range(60):
        before = proposals.point.clone()
        candidate, changed = proposals.propose(noise.bits(step, proposals.width), 3)
        assert float(candidate.min()) >= 0 and float(candidate.max()) <= 1
        assert float(distance(norm, candidate, proposals.x).max()) <= epsilon * (1 + 2e-5) + 1e-6
        differs = (candidate != before).any(1)
        assert torch.equal(differs.flatten(1).any(1), changed)
        if norm == "Linf":
            # On the sphere or on the boundary of the box, in a window of 3 x 3.
            edge = ((candidate - proposals.x).abs() - epsilon).abs() < 1e-6
            assert (edge | (candidate == 0) | (candidate == 1)).all()
            for mask in differs:
                if mask.any():
                    place = mask.nonzero()
                    assert (place.amax(0) - place.amin(0) < 3).all()
                    rows.add(int(place[:, 0].max()))
                    columns.add(int(place[:, 1].max()))
        accepted = torch.arange(7) % 2 == step % 2
        candidate = candidate.clone()
        proposals.settle(accepted)
        assert torch.equal(proposals.point, torch.where(accepted.view(-1, 1, 1, 1), candidate, before))
    if norm == "Linf":
        assert rows >= {10, 2} and columns >= {12, 2}  # windows reach every side of the image


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_the_budget_moves_between_windows(norm: str) -> None:
    proposals = proposals_of(norm)
    proposals.x.fill_(0.5)
    delta = torch.zeros(7, 3, 11, 13)
    delta[:, :, ::2] = 1.0
    size = delta[0].norm() if norm == "L2" else delta[0].abs().sum()
    proposals.point = proposals.x + delta * RADII[norm] / size
    candidate, _ = proposals.propose(Noise(torch.arange(7)).bits(0, proposals.width), 3)
    # The whole budget is spent before and after, while somewhere nothing is left.
    torch.testing.assert_close(
        distance(norm, candidate, proposals.x), torch.full((7,), RADII[norm], dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert ((candidate == 0.5) & (proposals.point != 0.5)).flatten(1).any(1).any()


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_a_black_box(net: nn.Module, batch: Data, norm: str) -> None:
    asked = torch.zeros((), dtype=torch.int64)

    def scores(x: Tensor) -> Tensor:
        """No module, no gradient."""
        asked.add_(len(x))
        with torch.no_grad():
            return torch.from_numpy(net(x).numpy().round(4))

    attack = Square(RADII[norm], norm=norm, queries=150)
    x_adv, queries = attack.with_queries(scores, batch.x, batch.y)
    assert torch.equal(attack(net, batch.x, batch.y, generator=torch.Generator().manual_seed(0)), x_adv)
    with torch.no_grad():
        before, after = net(batch.x).argmax(1) == batch.y, net(x_adv).argmax(1) == batch.y
    assert int(after.sum()) < 0.8 * int(before.sum())
    assert torch.equal(x_adv[after], batch.x[after])
    assert (queries[~before] == 0).all() and int(queries.max()) <= 151
    assert int(queries[after].min()) > int(queries[before & ~after].min())


def test_counts_every_query(robust_net: nn.Module, batch: Data) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images = 0

        def forward(self, x: Tensor) -> Tensor:
            self.images += len(x)
            return robust_net(x)

    model = Counting()
    _, queries = Square(0.1, queries=60, engine="autograd").with_queries(model, batch.x, batch.y)
    # Beside the queries one pass over the clean images.
    assert model.images == len(batch) + int(queries.sum())
    # Of one channel many a window changes nothing.
    assert 30 < float(queries[queries > 30].float().mean()) < 60


@pytest.mark.parametrize("norm", NORMS)
def test_the_batch_does_not_matter(robust_net: nn.Module, batch: Data, norm: str) -> None:
    def run(rows: Tensor) -> Tensor:
        keys = torch.arange(100, 164)[rows]
        classifier = Classifier(robust_net.eval(), "autograd")
        problem = Problem(classifier, batch.x[rows], batch.y[rows], None, torch.Generator(), keys)
        return Square(RADII[norm], norm=norm, queries=40).search(problem)

    rows = torch.arange(60, 3, -5)
    whole, part = run(torch.arange(64)), run(rows)
    assert (part != batch.x[rows]).any()
    torch.testing.assert_close(part, whole[rows], atol=1e-6, rtol=0)


def test_more_queries_and_restarts_are_never_weaker(robust_net: nn.Module, batch: Data) -> None:
    def left(**options: int) -> int:
        return correct(robust_net, Square(0.2, **options)(robust_net, batch.x, batch.y), batch.y)

    counts = [left(queries=10), left(queries=120), left(queries=120, restarts=3)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert correct(robust_net, Square(1.0, queries=300)(robust_net, batch.x, batch.y), batch.y) == 0


def test_targeted(net: nn.Module, batch: Data) -> None:
    target = (batch.y + 1) % 10
    x_adv = Square(0.5, queries=200)(net, batch.x, batch.y, target=target)
    with torch.no_grad():
        hit = net(x_adv).argmax(1) == target
    assert hit.sum() > 30
    assert torch.equal(x_adv[~hit], batch.x[~hit])


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 4), (3, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.rand(6, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    y = model(x).argmax(1)
    for norm in NORMS:
        assert Square(3.0, norm=norm, queries=30)(model, x, y).shape == x.shape
    with pytest.raises(ValueError, match="expected images"):
        Square(0.1)(model, x.view(6, *shape, *[1] * (4 - len(shape))), y)


def test_channels_last_reaches_the_model(batch: Data) -> None:
    seen = []

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x.flatten(1)[:, :4]

    x = torch.rand(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    Square(0.01, queries=20, engine="autograd")(Model(), x, x.flatten(1)[:, :4].argmax(1))
    assert all(seen) and len(seen) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries is 0"),
        ({"p": 1.5}, "p is 1.5"),
        ({"restarts": 0}, "restarts is 0"),
        ({"loss": "dlr"}, "loss is 'dlr'"),
        ({"norm": "L0"}, "norm is 'L0'"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Square(0.1, **options)
