"""Data-parallel AT-EMR training over one and two processes: gloo on the CPU, NCCL on GPUs.

    python -m benchmarks.parallel --model wrn-10-1 --batch 32

The trainer's own runs on random images, `--batch` images to a process (so the work of a process stays the same) and,
beside that, `--batch` images in all. Each process has as many threads. Images per second are those of the fastest epoch
after the first, validation not counted. Without synchronised BatchNorm, as on the CPU, each process has its own batch
statistics. The efficiency is images per second over those of as many processes that would not wait for each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, in_own_process, write_json
from benchmarks.throughput.tables import parallel_table, print_tables
from emr_kernels import keep_memory
from emr_training.config import make_config
from emr_training.data import Data
from emr_training.training import train

EPOCHS = 3


def one(model: str, batch: int, processes: int, device: str, precision: str, steps: int, threads: int) -> float | None:
    """Images per second of a run; None but in the first process."""
    torch.set_num_threads(threads)
    keep_memory()
    generator = torch.Generator().manual_seed(0)
    count = steps * batch
    data = Data(torch.rand(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator))
    settings = {
        "model": model, "defense": "at", "penalties.emr.strength": 1.0, "attack.steps": 10, "attack.epsilon": 8 / 255,
        "trainer.epochs": EPOCHS, "trainer.batch_size": batch, "trainer.devices": processes, "trainer.device": device,
        "trainer.precision": {"fp32": "32", "bf16": "bf16-mixed"}[precision], "trainer.channels_last": True,
        "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    trained = train(make_config(settings), data, None, 10)
    return max(epoch.images_per_second for epoch in trained.history[1:]) if trained.rank == 0 else None


def measure(model: str, batch: int, device: str, precision: str, steps: int, most: int = 2) -> dict[str, Any]:
    """Images per second by processes, with the whole batch fixed or that of each process."""
    available = torch.cuda.device_count() if device == "cuda" else most
    threads = max(1, torch.get_num_threads() // most) if device == "cpu" else torch.get_num_threads()
    arguments = ["--model", model, "--device", device, "--precision", precision, "--steps", str(steps)]
    arguments += ["--threads", str(threads)]
    rows: list[dict[str, Any]] = []
    for processes in range(1, most + 1):
        for kind, whole in (("a process", batch * processes), ("in all", batch)):
            if processes == 1 and kind == "in all":
                continue
            row: dict[str, Any] = {"processes": processes, "batch": batch, "of": kind}
            rows.append(row)
            if processes > available:
                row["failed"] = f"{available} GPU here"
                continue
            try:
                told = in_own_process("benchmarks.parallel", *arguments, "--batch", str(whole), "--one", str(processes))
            except RuntimeError as error:
                row["failed"] = str(error).strip().splitlines()[-1][:300]
                continue
            row["images per second"] = told["images per second"]
            row["efficiency"] = told["images per second"] / (processes * rows[0]["images per second"])
    backend = "NCCL" if device == "cuda" else "gloo"
    title = f"{model}, {precision}, {backend}, {threads} {'thread' if threads == 1 else 'threads'} a process"
    return {"title": title, "rows": rows}


def main() -> None:
    """Measure and print; with --output also write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn-10-1")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="in an epoch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        rate = one(
            options.model, options.batch, options.one, options.device, options.precision, options.steps,
            options.threads,
        )  # fmt: skip
        if rate is not None:
            print(json.dumps({"images per second": rate}))
        return
    record = measure(options.model, options.batch, options.device, options.precision, options.steps)
    print_tables([parallel_table(record)])
    if options.output:
        write_json(options.output, {**record, "environment": environment(torch.device(options.device))})


if __name__ == "__main__":
    main()
