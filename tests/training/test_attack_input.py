"""What every attack makes of bad input, of models that are no modules, and of models without gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attack_cases import ATTACKS, BY_GRADIENT, EPSILON, TARGETED
from emr_training.attacks import FGSM, PGD, Attack, AutoAttack, BoundedAttack, Square
from emr_training.data import Data
from side_effects import Normalising

every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
every_targeted = pytest.mark.parametrize("attack", TARGETED.values(), ids=TARGETED)
X, Y = torch.rand(4, 1, 8, 8), torch.arange(4)


class Watched(nn.Module):
    """Linear; remembers whether it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)
        self.called = False

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        return self.last(x.flatten(1))


@every_attack
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X + 1, Y, ValueError, r"x has values in .*; expected \[0, 1\]"),
        (-X, Y, ValueError, r"x has values in .*; expected \[0, 1\]"),
        (X * float("nan"), Y, ValueError, "x has values in"),
        (torch.full_like(X, 1 + 1e-7), Y, ValueError, r"1\.00000012\]; expected \[0, 1\]"),
        (X.mul(255).to(torch.uint8), Y, TypeError, "x is of type torch.uint8; expected a floating-point"),
        (X.numpy(), Y, TypeError, "x is of type ndarray"),
        (X.flatten(), Y, ValueError, r"x has shape \[256\]"),
        (X, Y[:3], ValueError, r"y has shape \[3\]; expected \[4\]"),
        (X, Y.float(), TypeError, "y is of type torch.float32; expected class indices"),
        (X, Y - 1, ValueError, "y has the label -1"),
    ],
)
def test_bad_images_and_labels(attack: Attack, x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    model = Watched()
    with pytest.raises(error, match=message):
        attack(model, x, y)
    assert not model.called


@every_attack
def test_bad_models(attack: Attack) -> None:
    with pytest.raises(ValueError, match="y has the label 12; expected labels below the model's 10 classes"):
        attack(Watched(), X, Y + 9)
    with pytest.raises(ValueError, match=r"the model's output is \[4, 8, 8, 1\]; expected logits \[4, C\]"):
        attack(nn.Unflatten(2, (8, 1)), X[:, 0], Y)
    with pytest.raises(ValueError, match=r"expected logits \[4, C\] with C >= 2"):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), X, 0 * Y)
    with pytest.raises(ValueError, match=r"the model's output is tuple; expected logits \[4, C\] with C >= 2"):
        attack(lambda x: (x.flatten(1), None), X, Y)
    broken = Watched()
    broken.last.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's output has NaN"):
        attack(broken, X, Y)
    # An attack that begins with a gradient finds that there is none.
    with pytest.raises((TypeError, ValueError), match=r"output is of torch.int64; expected logits|no gradient in x"):
        attack(lambda x: x.flatten(1)[:, :10].long(), X, Y)
    with pytest.raises(TypeError, match=r"model is of type str; expected a callable that returns logits \[N, C\]"):
        attack("a model", X, Y)


@every_attack
def test_empty_batch(net: nn.Module, attack: Attack) -> None:
    assert attack(net, X[:0], Y[:0]).shape == (0, 1, 8, 8)


@every_targeted
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (Y, ValueError, "target is the label itself in 4 places; expected another class for each image"),
        (Y - 1, ValueError, "target has the class -1; expected class indices >= 0"),
        (Y[:3], ValueError, r"target has shape \[3\].*; expected \[4\]"),
        (Y.float(), TypeError, "target is of type torch.float32; expected class indices"),
        (Y + 9, ValueError, "target has the class 12; expected classes below the model's 10"),
    ],
)
def test_bad_targets(attack: Attack, target: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attack(Watched(), X, Y, target=target)


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - TARGETED.keys()))
def test_attacks_without_a_targeted_form(name: str) -> None:
    with pytest.raises(ValueError, match="target is given; expected None"):
        ATTACKS[name](Watched(), X, Y, target=(Y + 1) % 10)


@pytest.mark.parametrize("kind", [FGSM, PGD])
def test_dlr_needs_three_classes_and_four_with_a_target(kind: type[FGSM] | type[PGD]) -> None:
    y = torch.tensor([0, 1, 0, 1])
    two, three = (nn.Sequential(nn.Flatten(), nn.Linear(64, classes)) for classes in (2, 3))
    attack = kind(EPSILON, loss="dlr")
    with pytest.raises(ValueError, match="a model of 2 classes; expected at least 3 classes"):
        attack(two, X, y)
    with pytest.raises(ValueError, match="a model of 3 classes; expected at least 4 classes"):
        attack(three, X, y, target=1 - y)


def test_kl_has_no_targeted_form() -> None:
    with pytest.raises(ValueError, match="target is given with loss 'kl'"):
        PGD(EPSILON, loss="kl")(Watched(), X, Y, target=(Y + 1) % 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed is -1; expected an integer >= 0"),
        ({"bn_mode": "Train"}, ValueError, "bn_mode is 'Train'; did you mean 'train'"),
        ({"bn_mode": "training"}, ValueError, "bn_mode is 'training'; did you mean 'train'"),
        ({"precision": "bf16"}, ValueError, "precision is 'bf16'; did you mean 'bfloat16'"),
        ({"engine": "jit"}, ValueError, "engine is 'jit'; expected one of 'auto', 'autograd'"),
    ],
)
@every_attack
def test_bad_settings(attack: Attack, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(attack, **options)


BOUNDED = {name: attack for name, attack in ATTACKS.items() if isinstance(attack, BoundedAttack)}


@pytest.mark.parametrize("attack", BOUNDED.values(), ids=BOUNDED)
def test_bad_balls(attack: BoundedAttack) -> None:
    with pytest.raises(ValueError, match=r"epsilon is -0\.1; expected a finite number >= 0"):
        replace(attack, epsilon=-0.1)
    with pytest.raises(ValueError, match="epsilon is nan"):
        replace(attack, epsilon=float("nan"))
    for value in ("8/255", None, [0.1], torch.tensor(0.1), True):
        with pytest.raises(TypeError, match=r"epsilon is .* of type \w+; expected a finite number >= 0"):
            replace(attack, epsilon=value)
    with pytest.raises(ValueError, match="norm is 'inf'; did you mean 'Linf'"):
        replace(attack, norm="inf")


@every_attack
def test_a_plain_callable_is_attacked_through_autograd(net: nn.Module, batch: Data, attack: Attack) -> None:
    net.eval()
    expected = replace(attack, engine="autograd")(net, batch.x, batch.y)
    grads = [p.grad for p in net.parameters()]
    found = attack(lambda x: net(x), batch.x, batch.y)
    assert torch.equal(found, expected)
    assert all(p.grad is grad for p, grad in zip(net.parameters(), grads, strict=True))
    with torch.no_grad():
        assert (net(found).argmax(1) == batch.y).sum() < (net(batch.x).argmax(1) == batch.y).sum()


@every_attack
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_models_that_write_into_their_input(net: nn.Module, batch: Data, attack: Attack, engine: str) -> None:
    x, y = batch.x[:8].clone(), batch.y[:8]
    attack = replace(attack, engine=engine)
    expected = attack(Normalising(net, in_place=False), x, y)
    assert torch.equal(attack(Normalising(net, in_place=True), x, y), expected)
    assert torch.equal(x, batch.x[:8])


@pytest.mark.parametrize("attack", BY_GRADIENT.values(), ids=BY_GRADIENT)
@pytest.mark.parametrize("how", ["no_grad", "detach", "numpy", "detached input"])
def test_a_model_without_gradients_is_an_error(net: nn.Module, batch: Data, attack: Attack, how: str) -> None:
    def score(x: Tensor) -> Tensor:
        if how == "no_grad":
            with torch.no_grad():
                return net(x)
        if how == "detached input":  # the logits have a graph, that of the parameters
            return net(x.detach())
        return net(x).detach() if how == "detach" else torch.from_numpy(net(x.detach()).detach().numpy())

    with pytest.raises(
        ValueError, match=r"the model's logits have no gradient in x .*; Square attacks one that is not"
    ):
        attack(score, batch.x[:8], batch.y[:8])


def test_square_attacks_a_model_without_gradients(net: nn.Module, batch: Data) -> None:
    @torch.no_grad()
    def score(x: Tensor) -> Tensor:
        return net(x)

    alone = Square(0.3, queries=50)
    both = AutoAttack(eps=0.3, version="custom", attacks_to_run={"square": alone}, verbose=False)
    for attack in (alone, both):
        x_adv = attack(score, batch.x, batch.y)
        assert (score(x_adv).argmax(1) == batch.y).sum() < 0.5 * (score(batch.x).argmax(1) == batch.y).sum()
