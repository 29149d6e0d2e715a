"""AutoAttack: emr_training, and the code of its authors (`pyautoattack`) where that is installed.

    python -m benchmarks.autoattack
    python -m benchmarks.autoattack --data path/to/mnist --epsilon 0.15 --output results.json

Two small convolutional networks are trained first, one on clean and one on adversarial images; then every contender
evaluates both on the same images with the standard version. The data are MNIST, from a folder of its idx files (packed
or not), or else scikit-learn's digits. Training is seeded, so that the networks are the same in every run on a machine.
A run takes minutes, so each is timed once: seconds on the clock, and of the processor, which other programs disturb
less.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import environment, synchronize, write_json
from benchmarks.throughput.tables import autoattack_table, print_tables
from emr_training.attacks import PGD, AutoAttack, AutoAttackResult
from emr_training.data import load_digits
from emr_training.data.idx import load_idx
from emr_training.data.splits import as_floats
from emr_training.models.cnn import SmallCNN

Images = tuple[Tensor, Tensor]
Contender = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, AutoAttackResult | None]]


def images(folder: Path | None) -> tuple[Images, Images]:
    """Training and test images."""
    if folder is not None:
        train, test = load_idx("mnist", folder)
    else:
        splits = load_digits(0)
        train, test = splits.train, splits.test
    return (as_floats(train.x), train.y), (as_floats(test.x), test.y)


def trained(data: Images, epsilon: float, steps: int, device: torch.device) -> nn.Module:
    """A small CNN after so many steps of Adam on batches of 100; adversarially with an epsilon > 0."""
    torch.manual_seed(0)
    x, y = (tensor.to(device) for tensor in data)
    model = SmallCNN(x.shape[1:], 10).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    order = torch.Generator().manual_seed(1)
    for step in range(steps):
        rows = torch.randint(len(y), (100,), generator=order).to(device)
        inputs, labels = x[rows], y[rows]
        if epsilon > 0:
            # The radius grows over the first third: from the start it would be too much to learn anything.
            radius = epsilon * min(1.0, 3 * step / steps)
            inputs = PGD(radius, 5, keep="last", seed=step)(model, inputs, labels)
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # FAB of the authors' code would compute gradients of the parameters, too.
    return model.eval().requires_grad_(False)


def ours(epsilon: float, **options: Any) -> Contender:
    """emr_training's."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, AutoAttackResult | None]:
        return AutoAttack(eps=epsilon, verbose=False, **options).run(model, x, y)

    return run


def authors(epsilon: float) -> Contender:
    """The authors' code as it ships."""
    from pyautoattack import AutoAttack as Original  # type: ignore[import-not-found]

    def run(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, AutoAttackResult | None]:
        attack = Original(model, norm="Linf", eps=epsilon, version="standard", seed=0, device=x.device)
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=250)
        return x_adv, None

    return run


WAYS: dict[str, Callable[[float], Contender]] = {
    "pyautoattack": authors,
    "emr_training": ours,
    "emr_training, by yield": lambda epsilon: ours(epsilon, order="yield"),
    "emr_training, bfloat16": lambda epsilon: ours(epsilon, precision="bfloat16"),
}


def contenders(names: Sequence[str], epsilon: float) -> tuple[dict[str, Contender], dict[str, str]]:
    """By name, and why one is absent."""
    found: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            found[name] = WAYS[name](epsilon)
        except ImportError as error:
            absent[name] = str(error)
    return found, absent


@dataclass(frozen=True)
class Plan:
    """What is attacked, and by whom.

    data: folder of MNIST's idx files; None: scikit-learn's digits. steps: of training.
    """

    data: Path | None = None
    images: int = 200
    epsilon: float = 0.1
    steps: int = 400
    contenders: Sequence[str] = tuple(WAYS)
    device: str = "cpu"


def one(run: Contender, model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Robust accuracy and seconds of one contender."""
    synchronize(x.device)
    begin, processor = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv, result = run(model, x, y)
    synchronize(x.device)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    with torch.no_grad():
        robust = float((model(x_adv).argmax(1) == y).double().mean())
    found: dict[str, Any] = {"robust": robust, "seconds": round(seconds, 2), "processor": round(processor, 2)}
    if result is not None:
        found["attacks"] = result.as_dict()["attacks"]
    return found


def measure(plan: Plan) -> dict[str, Any]:
    """Robust accuracy and seconds of every contender on both networks."""
    device = torch.device(plan.device)
    train, test = images(plan.data)
    x, y = (tensor[: plan.images].to(device) for tensor in test)
    ways, absent = contenders(plan.contenders, plan.epsilon)
    record: dict[str, Any] = {
        "title": f"{'digits' if plan.data is None else 'MNIST'}, {len(y)} images, Linf {plan.epsilon:g}",
        "absent": absent,
        "models": {},
    }
    for name, epsilon in {"standard": 0.0, "adversarial": plan.epsilon}.items():
        model = trained(train, epsilon, plan.steps, device)
        model(x)  # what any first call loads
        record["models"][name] = {way: one(run, model, x, y) for way, run in ways.items()}
    return record


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of MNIST's idx files")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--contenders", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    record = measure(Plan(**options))
    print_tables([autoattack_table(record)])
    if output:
        write_json(output, {**record, "environment": environment(torch.device(options["device"]))})


if __name__ == "__main__":
    main()
