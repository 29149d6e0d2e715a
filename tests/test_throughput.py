"""The throughput benchmarks: right answers only, reasons for failures, what is counted, files, comparisons, pages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attacks, autoattack, contest, effective_weights, margins, measure, penalty, scaling, training
from benchmarks.contest import BOUND, Contender, Options, Runner
from benchmarks.micro import check
from benchmarks.products import Passes, calls_of, roofline
from benchmarks.setting import Setting
from benchmarks.throughput import __main__ as command
from benchmarks.throughput import compare, pages
from benchmarks.throughput.files import read
from benchmarks.throughput.profiling import group_of
from benchmarks.throughput.sizes import SIZES

TINY = Setting("cnn-4", 3, resolution=8)
CEILINGS = {"copy": 1e9, "matmul": 1e9, "convolution": 2e9}
CONTESTS = ["penalty", "attacks", "training", "effective_weights", "margins"]


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes a second."""
    monkeypatch.setattr(contest, "ceilings", lambda device, dtype: CEILINGS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a quick call."""
    output = tmp_path_factory.mktemp("throughput") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "ceilings", lambda device, dtype: CEILINGS)
        assert command.main(["--device", "cpu", "--quick", "--sections", *CONTESTS, "--output", str(output)]) == 0
    return output


def test_a_quick_call_leaves_times_differences_and_figures(measured: Path) -> None:
    record = read(measured)
    assert set(record["sections"]) == set(CONTESTS)
    for name, section in record["sections"].items():
        (case,) = section["cases"].values()
        assert case["float64 difference"] <= 1e-8 and case["environment"]["torch"] == torch.__version__
        kinds = [c["kind"] for c in case["contenders"].values()]
        assert kinds.count("ours") == kinds.count("bound") == 2
        for full, contender in case["contenders"].items():
            if full.startswith(("torchattacks", "foolbox")) and "failed" in contender:
                assert "No module named" in contender["failed"]
            else:
                assert contender["seconds"]["min"] <= contender["seconds"]["median"] <= contender["seconds"]["max"]
        assert (measured.parent / f"out-{name}.png").stat().st_size > 5_000


def test_a_step_changes_parameters_and_statistics() -> None:
    # A comparison of what never changes would prove nothing.
    setting = Setting("wrn-10-1", 2, resolution=8)
    model, _, _ = setting.make()
    runner = training.ours(setting, "nchw")
    found = runner.answer(runner.step())
    before = {"parameters": list(model.parameters()), "statistics": [b for b in model.buffers() if b.dim()]}
    for group, tensors in before.items():
        pairs = zip([t for t in found[group] if t.dim()], tensors, strict=True)
        assert not any(torch.equal(now, then) for now, then in pairs), group


def test_other_answers_and_errors_are_told_and_not_timed() -> None:
    def wrong(setting: Setting, layout: str) -> Runner:
        right = effective_weights.by_autograd(setting, layout)
        return Runner(right.step, lambda found: {"weights": [found * 1.1]})

    def failing(setting: Setting, layout: str) -> Runner:
        raise RuntimeError("no such thing\nand more")

    ways = {"autograd": Contender(effective_weights.by_autograd), "wrong": Contender(wrong)}
    ways |= {"failing": Contender(failing), "near": Contender(wrong, "approximate")}
    held = replace(effective_weights.CONTEST, ways=ways, exact=False)
    found = contest.run(held, TINY, Options(1, memory=False))["contenders"]
    assert "seconds" not in found["wrong, nchw"] and "differs by 1.0e-01" in found["wrong, nchw"]["failed"]
    assert found["failing, nchw"]["failed"] == "RuntimeError: no such thing"
    assert found["near, nchw"]["difference"] == pytest.approx(0.1, rel=1e-3) and "seconds" in found["near, nchw"]
    assert list(found)[:2] == [f"{BOUND}, nchw", f"{BOUND}, channels_last"]


def test_ours_is_not_timed_where_float64_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "exact_differences", lambda *_: {"emr_kernels": 1e-5})
    found = contest.run(effective_weights.CONTEST, TINY, Options(1, memory=False))["contenders"]
    assert "in float64" in found["emr_kernels, nchw"]["failed"] and "seconds" in found["autograd, nchw"]


def test_a_step_without_the_penalty_is_another_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # At the precision that is timed its part of the gradient is less than what rounding does to the attack.
    def forgetful(setting: Setting, layout: str) -> Runner:
        runner = training.released(setting, layout)

        def step() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "STRENGTH", 0.0)
                return runner.step()

        return Runner(step, runner.answer)

    ways = {"released step, eager": Contender(training.released), "forgetful": Contender(forgetful)}
    held = replace(training.CONTEST, ways=ways)
    found = contest.run(held, TINY, Options(1, memory=False))["contenders"]
    assert found["forgetful, nchw"]["difference"] < training.CONTEST.tolerance["fp32"]
    assert "in float64 it differs by" in found["forgetful, nchw"]["failed"]
    assert "seconds" in found["released step, eager, nchw"]


def test_attacks_that_do_nothing_or_too_much_are_other_answers() -> None:
    def idle(setting: Setting, layout: str) -> Runner:
        right = attacks.eager(setting, layout)
        x = setting.make(layout)[1]
        return Runner(lambda: x, right.answer)

    def outside(setting: Setting, layout: str) -> Runner:
        right = attacks.eager(setting, layout)

        def step() -> torch.Tensor:
            found: torch.Tensor = right.step()
            found[0, 0, 0, 0] = 1.001
            return found

        return Runner(step, right.answer)

    ways = {"eager": Contender(attacks.eager), "idle": Contender(idle), "outside": Contender(outside)}
    held = replace(attacks.CONTEST, ways=ways, exact=False)
    found = contest.run(held, TINY, Options(1, memory=False))["contenders"]
    assert "another answer" in found["idle, nchw"]["failed"] and "another answer" in found["outside, nchw"]["failed"]
    assert "seconds" in found["eager, channels_last"]


def test_others_attacks_get_frozen_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    made = Setting.make

    def make(setting: Setting, layout: str = "nchw") -> Any:
        model, x, y = made(setting, layout)
        model.register_forward_pre_hook(lambda model, _: asked.append(any(p.requires_grad for p in model.parameters())))
        return model, x, y

    monkeypatch.setattr(Setting, "make", make)
    for module, runner in (("torchattacks", attacks.torchattacks), ("foolbox", attacks.foolbox)):
        pytest.importorskip(module)
        runner(TINY, "nchw").step()
    assert asked and not any(asked)


def test_a_quick_autoattack_has_something_to_attack() -> None:
    plan = autoattack.Plan(**SIZES["quick"].autoattack)
    (train, (x, y)) = autoattack.images(None)
    model = autoattack.trained(train, 0.0, plan.steps, torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    assert (model(x[: plan.images]).argmax(1) == y[: plan.images]).any()


def test_finite_differences_are_the_penalty_in_the_limit() -> None:
    # No kink of the ReLUs lies within 1e-7 of these images: the function is linear there.
    small = TINY.with_(precision="fp64")
    runners = [penalty.double_backward(small, "nchw"), penalty.finite_differences(small, "nchw", 1e-7)]
    right, found = ([g.clone() for g in r.answer(r.step())["gradients"]] for r in runners)
    assert contest.difference({"": found}, {"": right}) < 1e-6


def test_margins_are_the_distances_of_a_linear_model() -> None:
    torch.manual_seed(0)
    weight, logits, y = torch.randn(3, 5), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    found = margins.least_margin(logits, weight.expand(4, 3, 5), y)
    for i, label in enumerate(y.tolist()):
        others = [
            (logits[i, label] - logits[i, j]) / (weight[label] - weight[j]).norm() for j in range(3) if j != label
        ]
        torch.testing.assert_close(found[i], min(others))


@pytest.mark.parametrize("held", [effective_weights.CONTEST, margins.CONTEST], ids=lambda held: held.name)
def test_low_precision_is_that_of_every_contender(held: contest.Contest) -> None:
    # The bound beside them is that of products in bfloat16.
    for name, way in held.ways.items():
        low, full = (way.make(TINY.with_(precision=p), "nchw") for p in ("bf16", "fp32"))
        gap = contest.difference(low.answer(low.step()), full.answer(full.step()))
        assert 1e-4 < gap < held.tolerance["bf16"], name


def test_the_first_call_counts_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[int] = []
    whole = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *a, **k: exported.append(1) or whole(*a, **k))
    runner = effective_weights.by_kernels(TINY, "nchw")
    assert not exported
    runner.step()
    assert exported
    exported.clear()
    runner.step()
    assert not exported


def test_ceilings_are_the_best_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured while something else ran, a limit would be beaten.
    rates = iter([2.0, 3.0, 1.0])
    monkeypatch.setattr(measure, "_BEST", {})
    monkeypatch.setattr(measure, "copy_ceiling", lambda device: next(rates))
    monkeypatch.setattr(measure, "matmul_ceiling", lambda device, dtype: 1.0)
    monkeypatch.setattr(measure, "convolution_ceiling", lambda device, dtype: 1.0)
    found = [measure.ceilings(torch.device("cpu"), torch.float32)["copy"] for _ in range(3)]
    assert found == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--model", "cnm"], "did you mean 'cnn'?"), (["--batch", "0"], "--batch is 0; expected at least 1")],
)
def test_bad_input_of_a_contest_alone_is_told(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["penalty", *arguments])
    with pytest.raises(SystemExit, match="2"):
        contest.main(penalty.CONTEST, "", "cnn", 4)
    assert told in capsys.readouterr().err


def test_scaling_is_told_without_points_and_with_flat_ones() -> None:
    axis = {"title": "t", "unit": "images", "ended": "1 images: too many", "points": [], "slopes": {"ours": {}}}
    assert pages.case_lines(axis) == ["t: nothing was measured: 1 images: too many\n"]
    point = {"size": 4, "seconds": {"ours": {"median": 1.0}}, "tensors": {"ours": 5e6}}
    flat = {**axis, "points": [point], "slopes": {"ours": {"seconds": None, "tensors": 0.0}}}
    assert "| ours | 1 s | ? | 5 MB | 0.00 |" in pages.case_lines(flat)


def test_products_are_counted_layer_by_layer() -> None:
    setting = Setting("mlp-5", 7, classes=3)
    first, second = calls_of(setting)
    assert (first.operations, second.operations) == (2 * 7 * 784 * 5, 2 * 7 * 5 * 3)
    assert second.bytes == 4 * (7 * 5 + 5 * 3 + 7 * 3)
    for call in (first, second):
        torch.testing.assert_close(call.data(), call.cotangent @ call.weight)
        assert call.forward().shape == call.cotangent.shape and call.weights().shape == call.weight.shape
    found = roofline(setting, Passes(forward=2, data=3, weight=1, images=0), CEILINGS)  # type: ignore[arg-type]
    assert found["operations"] == 3 * first.operations + 6 * second.operations
    assert found["bytes"] == 3 * first.bytes + 6 * second.bytes
    # 2 GFLOP/s and 1 GB/s: the first layer is held by its operations, the second by its bytes.
    assert found["seconds"] == pytest.approx(
        3 * max(first.operations / 2e9, first.bytes / 1e9) + 6 * second.bytes / 1e9
    )


def test_convolutions_are_counted() -> None:
    (first, *_, last) = calls_of(Setting("cnn-4", 2, resolution=8), "channels_last")
    assert first.operations == 2 * 2 * 4 * 8 * 8 * 3 * 9 and last.operations == 2 * 2 * 8 * 16 * 10
    assert first.data().shape == first.given.shape and first.weights().shape == first.weight.shape


def test_the_slope_is_the_exponent_of_the_larger_half() -> None:
    assert scaling.slope((n, 3.0 * n**1.5) for n in (1, 2, 4, 8)) == pytest.approx(1.5)
    assert scaling.slope([(1, 5.0), (2, 5.0), (4, 4.0), (8, 8.0)]) == pytest.approx(1.0)
    assert scaling.slope([(1, 1.0)]) is None


def test_an_axis_ends_where_a_size_fails() -> None:
    axis = scaling.Axis([1, 2, 0], lambda n: TINY.with_(batch=n), penalty.CONTEST, "images")
    found = scaling.measure_axis(axis, 1e9, 1)
    assert [point["size"] for point in found["points"]] == [1, 2] and found["ended"].startswith("0 images: ")
    ours, theirs = (found["points"][-1]["tensors"][name] for name in ("emr_kernels", "double backward"))
    assert 0 < ours < theirs
    assert scaling.measure_axis(axis, 0.0, 1)["ended"] == "a call over 0 s"
    strict = replace(axis, contest=replace(penalty.CONTEST, tolerance={"fp32": -1.0}))
    found = scaling.measure_axis(strict, 1e9, 1)
    assert not found["points"] and "another answer: emr_kernels differs by" in found["ended"]


def test_resuming_measures_what_is_left(measured: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "again.json"
    record = read(measured)
    (case,) = record["sections"]["margins"]["cases"].values()
    case["sources"] = "others"
    output.write_text(json.dumps(record))
    ran: list[str] = []

    def fake(contest: Any, setting: Setting, options: Options) -> dict[str, Any]:
        ran.append(contest.name)
        raise RuntimeError("words")

    cases = {name: command.SECTIONS[name] for name in CONTESTS}
    for name, section in cases.items():
        patched = replace(
            section,
            cases=lambda wanted, name=name: {"cnn-4, 4, fp32": lambda: fake(cases[name].contest, TINY, wanted.options)},
        )
        monkeypatch.setitem(command.SECTIONS, name, patched)
    arguments = ["--device", "cpu", "--quick", "--resume", "--sections", *CONTESTS, "--output", str(output)]
    assert command.main(arguments) == 1 and ran == ["margins"]
    (case,) = read(output)["sections"]["margins"]["cases"].values()
    assert case["failed"] == "RuntimeError: words"
    # What failed is tried again.
    assert command.main(arguments) == 1 and ran == ["margins", "margins"]
    # What was measured without the contenders of torch.compile, or on other threads, is not what is asked for.
    ran.clear()
    assert command.main([*arguments, "--compile"]) == 1 and ran == CONTESTS


def test_other_threads_are_measured_again(measured: Path) -> None:
    (case,) = read(measured)["sections"]["penalty"]["cases"].values()
    about = {"environment": case["environment"], "sources": case["sources"], "compile": False}
    assert command._measured_alike(case, about)
    about["environment"] = {**case["environment"], "threads": 99}
    assert not command._measured_alike(case, about)


def test_a_regression_is_named(measured: Path) -> None:
    old, new = read(measured), read(measured)
    (case,) = new["sections"]["penalty"]["cases"].values()
    for name in case["contenders"]:
        if "emr_kernels" in name or "double" in name:
            case["contenders"][name]["seconds"]["median"] *= 1.2
    worse = [row for row in compare.compare(old, new, CONTESTS) if row.regressed]
    assert {row.name.rpartition(": ")[2] for row in worse} == {"emr_kernels, nchw", "emr_kernels, channels_last"}
    assert all(row.ratio == pytest.approx(1.2) for row in worse)
    # A machine that is slower as a whole is none.
    case["bound"] *= 1.2
    assert not any(row.regressed for row in compare.compare(old, new, CONTESTS))


def test_what_the_clock_does_not_tell_is_not_compared() -> None:
    ways = {"emr_training": {"seconds": 0.0, "processor": 0.0}, "pyautoattack": {"seconds": 1.0, "processor": 1.0}}
    record = {"sections": {"autoattack": {"cases": {"digits": {"models": {"standard": ways}}}}}}
    rows = compare.compare(record, record, ["autoattack"])
    assert [row.name.rpartition(", ")[2] for row in rows] == ["pyautoattack"]


def test_files_with_nothing_in_common_are_told(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = read(measured)
    for section in record["sections"].values():
        section["cases"] = {f"another {identity}": case for identity, case in section["cases"].items()}
    (tmp_path / "other.json").write_text(json.dumps(record))
    monkeypatch.setattr(command, "measure", lambda *_: None)
    arguments = ["--device", "cpu", "--quick", "--sections", "penalty", "--output", str(measured), "--compare"]
    assert command.main([*arguments, str(tmp_path / "other.json")]) == 2
    told = capsys.readouterr()
    assert "other.json has no case of these sections" in told.err and "no regressions" not in told.out
    assert command.main([*arguments, str(measured)]) == 0
    assert "no regressions" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"sections": {"penalty": 5}}', '{"sections": {"penalty": {"cases": []}}}', "[]"])
def test_what_is_no_file_of_these_benchmarks_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match=r"old\.json is no file of the throughput benchmarks"):
        read(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--compare", "missing.json"], "missing.json is no file of the throughput benchmarks"),
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--models", "wrn-11-1"], "depth is 11"),
        (["--models", "cnm"], "model is 'cnm'; did you mean 'cnn'?"),
        (["--device", "cuda"], "--device is cuda; expected cpu"),
    ],
)
def test_bad_input_is_told_before_any_work(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command.main(["--sections", "penalty", "--device", "cpu", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_damaged_output_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.json").write_text("{")
    assert command.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "out.json")]) == 2
    assert "out.json is no file of the throughput benchmarks" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_text() == "{"


def test_a_record_of_the_gpu_check_is_read(measured: Path, tmp_path: Path) -> None:
    parts = [{"sections": {name: section}} for name, section in read(measured)["sections"].items()]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"figures": {f"throughput-{i}": part for i, part in enumerate(parts)} | {"micro": {}}}))
    assert read(file) == read(measured)


def test_results_are_written_into_pages(measured: Path) -> None:
    records = pages.results(measured.parent)
    text = pages.docs(records, measured.parent)
    assert list(records) == ["out"] and pages.NO_GPU in text and "out-training.png" in text
    assert "| **emr_kernels** |" in text and "cnn-4, batch 4, float32, 8 px" in text
    assert "AT-EMR step: cnn-4" in pages.headline(records)
    assert pages.replaced(f"a{pages.BEGIN}old{pages.END}b", "new") == f"a{pages.BEGIN}\n\nnew\n\n{pages.END}b"
    with pytest.raises(ValueError, match="lacks"):
        pages.replaced("nothing", "new")


def test_pages_hold_the_committed_results() -> None:
    for path, text in pages.pages().items():
        assert path.read_text() == text, f"{path} is old: python -m benchmarks.throughput.pages"


def test_kernels_are_told_apart() -> None:
    assert group_of("emr::affine_relu_out") == group_of("PenaltyFunction") == "ours"
    assert group_of("_affine_relu_kernel", frozenset({"_affine_relu_kernel"})) == "ours"
    names = ("mkldnn::_linear_pointwise", "aten::convolution_backward", "aten::addmm", "sm90_xmma_wgrad_bf16")
    assert {group_of(name) for name in names} == {"convolutions and products"}
    assert group_of("aten::native_batch_norm") == "the rest"


def row(
    fraction: float, contender: str = "cpu", operator: str = "sq_norms", seconds: float | None = None
) -> dict[str, Any]:
    """Beside a ceiling of a second, unless seconds say otherwise."""
    key = {"operator": operator, "case": "", "shape": "4", "dtype": "float32", "layout": "nchw"}
    return {**key, "contender": contender, "fraction": fraction, "seconds": seconds or 1 / fraction}


def test_operators_are_held_to_their_stored_rows() -> None:
    old = [row(0.9), row(0.9, "eager"), row(0.8, operator="pgd_step")]
    assert check.slower(old, [row(0.83), row(0.1, "eager")]) == {}
    (ratio,) = check.slower(old, [row(0.6)]).values()
    assert ratio == pytest.approx(1.5)
    # A machine that is slower as a whole; a ceiling that had a good round.
    assert check.slower(old, [row(0.9, seconds=3.0)]) == check.slower(old, [row(0.4, seconds=1 / 0.9)]) == {}
    assert [key[0] for key in check.lost(old, [row(0.9)])] == ["pgd_step"]


def test_damaged_stored_rows_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.json").write_text("{")
    (tmp_path / "new.json").write_text(json.dumps({"environment": {"device": "d"}, "rows": [row(0.9)]}))
    arguments = ["--new", str(tmp_path / "new.json"), "--baseline", str(tmp_path / "old.json")]
    monkeypatch.setattr("sys.argv", ["check", *arguments])
    assert check.main() == 2
    assert "old.json is no file of python -m benchmarks.micro" in capsys.readouterr().err


def test_what_seems_slower_is_measured_again() -> None:
    old, asked = [row(0.9), row(0.8, operator="pgd_step")], []

    def again(keys: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
        asked.append({key[0] for key in keys})
        return [row(0.9), row(0.5, operator="pgd_step")]

    found = check.confirmed(old, [row(0.3), row(0.4, operator="pgd_step")], again)
    assert asked == [{"sq_norms", "pgd_step"}, {"pgd_step"}]
    assert {key[0]: ratio for key, ratio in found.items()} == {"pgd_step": pytest.approx(1.6)}
