"""What a training leaves behind at its end: scores of the cases held out, its log, its curves."""

import csv
import io
import json
import shutil
import signal
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mambahome_jax.commands import train as command
from mambahome_jax.evaluation.results import read_evaluation
from mambahome_jax.flags import TrainConfig
from mambahome_jax.imaging.geometry import orientation_of
from mambahome_jax.patches.store import Store
from mambahome_jax.recipes import OptimizerConfig
from mambahome_jax.training import callbacks, held_out, runs, validation
from mambahome_jax.training.callbacks import Curves, MetricsFile
from mambahome_jax.training.curves import Drawn, write_curves
from mambahome_jax.training.progress import Display, fit_values, train_line
from mambahome_jax.training.schedule import Schedule, TimeBudget
from mambahome_jax.training.validation import Validation
from tests.commands.test_train import _config, _dataset, _scan, _small  # noqa: F401
from tests.training.stand_in import log_steps, steps_take


def _with_images(root):
    """The scans of the dataset as files too, turned to LPS: the grids of the results are theirs."""
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    turned = np.diag([-1.0, -1, 1, 1])
    turned[:2, 3] = [19, 17]
    for number in range(5):
        for folder, array in zip(("images", "labels"), _scan(number), strict=True):
            nib.save(nib.Nifti1Image(array[::-1, ::-1], turned), root / folder / f"c{number}.nii.gz")
    return root


def _summary(run):
    return json.loads((run / "validation" / "summary.json").read_text())


def test_a_training_ends_with_the_scores_of_all_cases_held_out(tmp_path, capsys):
    data, run = _with_images(_dataset(tmp_path / "data", val=("c3", "c4"))), tmp_path / "run"
    assert command.run(_config(data, run, steps=2, max_val_cases=1)) == 0
    text = capsys.readouterr().out
    assert {path.name for path in (run / "validation").iterdir()} == {
        *("c3.nii.gz", "c4.nii.gz", "metrics.csv", "summary.json", "report.html"),
    }
    summary, evaluation = _summary(run), read_evaluation(run / "validation")
    assert [row.case for row in evaluation.scores] == ["c3", "c4"] and summary["cases"] == 2
    assert summary["checkpoint"] == {"name": "best", "step": 2, "chosen_on": ["c3"]}
    assert "chosen by its Dice on 1 of these" in summary["note"] and summary["note"] in text
    assert "2 cases, mean of each structure" in text and text.index("mean of each") < text.index(
        "Next: mambahome infer"
    )
    result = nib.load(run / "validation" / "c4.nii.gz")
    assert orientation_of(result.affine) == "LPS"
    prediction, reference = (np.asarray(image.dataobj) for image in (result, nib.load(data / "labels" / "c4.nii.gz")))
    dice = 2 * np.sum(prediction & reference) / (prediction.sum() + reference.sum())
    assert evaluation.scores[1].dice == pytest.approx(dice, abs=1e-5)
    page = (run / "validation" / "report.html").read_text()
    assert "c4" in page and "data:image/png" in page
    report = json.loads((run / "run.json").read_text())["held_out"]
    assert report["dice"] == summary["mean"]["dice"] and report["checkpoint"] == {"name": "best", "step": 2}
    # The log has what was said, without bars; the picture has both charts.
    log = (run / "log.txt").read_text()
    assert all(line.rstrip() in log for line in text.splitlines() if "│" not in line and "━" not in line)
    with Image.open(run / "progress.png") as picture:
        assert picture.size == (1100, 640)
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]][:6] == ["step", "epoch", "loss", "lr", "val_dice", "dice_box"]
    assert rows[0]["dice_box"] == "" and rows[1]["dice_box"] == rows[1]["val_dice"] != ""


@pytest.mark.parametrize("members", [1, 2])
def test_the_log_begins_with_what_the_plan_decided(tmp_path, capsys, monkeypatch, members):
    monkeypatch.setattr(runs, "plan_lines", lambda *_: ["By plan.json: steps 1"])
    assert command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", steps=1, members=members)) == 0
    log = next((tmp_path / "run").glob("log.txt" if members == 1 else "member_0/log.txt")).read_text()
    assert log.startswith("By plan.json: steps 1\n") and capsys.readouterr().out.count("By plan.json") == 1


def test_a_finished_run_that_is_resumed_scores_nothing_twice(tmp_path, capsys, monkeypatch):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=2)
    assert command.run(config) == 0
    before = capsys.readouterr().out
    monkeypatch.setattr(held_out, "predict_case", lambda *_: pytest.fail("segmented twice"))
    assert command.run(_config(config.data_train, config.output_dir, steps=2, resume=True)) == 0
    table = before[before.index("1 case, mean") : before.index("finished")]
    assert table in capsys.readouterr().out
    assert (tmp_path / "run" / "log.txt").read_text().count("finished: step 2") == 2


def test_another_training_in_the_folder_does_not_show_the_scores_of_the_first(tmp_path):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=1)
    validation = tmp_path / "run" / "validation"
    assert command.run(config) == 0
    marked = _summary(tmp_path / "run") | {"mean": {"dice": 0.987}}
    (validation / "summary.json").write_text(json.dumps(marked))
    shutil.copy(validation / "c4.nii.gz", validation / "of_the_first.nii.gz")
    (validation / "mine.txt").write_text("kept")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert command.run(config) == 0
    assert _summary(tmp_path / "run")["mean"]["dice"] != 0.987
    assert (validation / "mine.txt").exists() and not (validation / "of_the_first.nii.gz").exists()


def test_a_case_that_failed_in_a_validation_and_is_scored_is_not_called_unscored(tmp_path, capsys, monkeypatch):
    result = Validation(0.5, {"box": 0.5}, (("c4", "for a moment"),))
    monkeypatch.setattr(validation, "make_validate", lambda *_: lambda params, stop: result)
    assert command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", steps=1)) == 1
    summary = _summary(tmp_path / "run")
    assert summary["cases"] == 1 and summary["failures"] == []
    assert "Not scored" not in capsys.readouterr().out


def test_without_a_score_the_last_weights_are_scored_and_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "make_validate", lambda *_: lambda params, stop: Validation(float("nan"), {}))
    assert command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", steps=2)) == 0
    summary = _summary(tmp_path / "run")
    assert summary["checkpoint"] == {"name": "last", "step": 2, "chosen_on": []} and summary["note"] == ""


def test_a_case_that_cannot_be_segmented_is_a_failure_by_name(tmp_path, capsys):
    data = _dataset(tmp_path / "data", val=("c3", "c4"))
    for file in (data / "store" / "c4" / "image").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(file.read_bytes()[:100])
    # Not validated on: only the scores at the end can find it.
    assert command.run(_config(data, tmp_path / "run", steps=1, max_val_cases=1)) == 1
    assert "Not scored: c4: " in capsys.readouterr().out
    summary = _summary(tmp_path / "run")
    assert summary["cases"] == 1 and [failure["case"] for failure in summary["failures"]] == ["c4"]
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["exit_code"] == 1 and [failure["id"] for failure in report["failures"]] == ["c4"]


def test_scores_that_cannot_be_written_cost_the_exit_code_and_nothing_else(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation").write_text("in the way")
    assert command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", steps=1)) == 1
    text = capsys.readouterr().out
    assert "No held-out scores: " in text and "finished: step 1" in text


def test_a_signal_leaves_the_scores_to_the_command_that_it_names(tmp_path, capsys, monkeypatch):
    data, original = _dataset(tmp_path / "data", val=("c3", "c4")), held_out.predict_case

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(held_out, "predict_case", interrupted)
    assert command.run(_config(data, tmp_path / "run", steps=1)) == 143
    text = capsys.readouterr().out
    assert not (tmp_path / "run" / "validation" / "summary.json").exists()
    assert f"mambahome train --data_train {data} --output_dir {tmp_path / 'run'}" in text and "--resume" in text
    monkeypatch.setattr(held_out, "predict_case", original)
    assert command.run(_config(data, tmp_path / "run", steps=1, resume=True)) == 0
    assert _summary(tmp_path / "run")["cases"] == 2


def test_a_timed_run_stopped_in_its_scores_goes_on_with_them(tmp_path, monkeypatch):
    data, original = _dataset(tmp_path / "data"), held_out.predict_case

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(held_out.HeldOutCases, "_late", lambda _: False)
    options = {"steps": None, "val_every": None, "max_minutes": 2.0}
    started = steps_take(monkeypatch, seconds=10)
    monkeypatch.setattr(held_out, "predict_case", interrupted)
    assert command.run(_config(data, tmp_path / "run", **options), started) == 143
    config = json.loads((tmp_path / "run" / "checkpoints" / "last" / "config.json").read_text())
    assert config["ended"] and config["seconds_spent"] < config["seconds_in_all"]
    monkeypatch.setattr(held_out, "predict_case", original)
    assert command.run(_config(data, tmp_path / "run", **options, resume=True), started) == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["step"] == config["step"] and _summary(tmp_path / "run")["cases"] == 1


def test_the_time_of_the_scores_is_kept_free(tmp_path):
    now = [0.0]
    budget = TimeBudget(1000.0, clock=lambda: now[0])
    budget.step_ended()
    with budget.validating():
        now[0] += 20
    budget.expect_validation(20)
    without = budget.held_out_seconds()
    budget.held_out = 3.0
    assert without == 0 and budget.held_out_seconds() == 2 * 3 * 20 + 5
    # One second before validation and scores no longer fit, and one after.
    reserve = 1.15 * 20 + budget.margin() + 1 + 125
    now[0] = 1000 - reserve - 1
    assert not budget.decide().last
    now[0] += 2
    assert budget.decide().last


def test_scores_end_no_training_early(tmp_path):
    """An hour with 4 of 200 cases in a validation of 24 s kept 40 minutes free for the scores."""
    now = [0.0]
    budget = TimeBudget(3600.0, clock=lambda: now[0])
    budget.step_ended()
    budget.held_out = 50.0
    for seconds, scores, kept in ((100, 100 + 5, 100 + 5), (24, 2 * 50 * 24 + 5, 0.15 * 3600)):
        with budget.validating():
            now[0] += seconds  # the first one compiles
        assert budget.held_out_seconds() == scores
        begun, reserve = now[0], 1.15 * seconds + budget.margin() + 1 + kept
        for early, last in ((1, False), (-1, True)):
            now[0] = 3600 - reserve - early
            assert budget.decide().last == last
        now[0] = begun
    assert budget.held_out_seconds(1 / 200) == 2 * 24 / 4 + 5


@pytest.mark.parametrize("from_first_step", [False, True])
def test_minutes_from_the_first_step_leave_the_scores_out(from_first_step):
    now = [0.0]
    budget = TimeBudget(100.0, from_first_step=from_first_step, clock=lambda: now[0])
    budget.step_ended()
    with budget.validating():
        now[0] += 5
    budget.held_out, now[0] = 50.0, 500.0
    run = SimpleNamespace(schedule=SimpleNamespace(budget=budget))
    cases = held_out.HeldOutCases(None, None, SimpleNamespace(cases=("c1",)), None, run)
    assert cases._late() == (not from_first_step) and (budget.held_out_seconds() == 0) == from_first_step


def test_cases_for_which_no_time_is_left_are_counted(tmp_path, capsys, monkeypatch):
    data, late = _dataset(tmp_path / "data", val=("c3", "c4")), iter([False, True])
    monkeypatch.setattr(held_out.HeldOutCases, "_late", lambda _: next(late))
    config = _config(data, tmp_path / "run", steps=None, val_every=None, max_minutes=2.0)
    assert command.run(config, steps_take(monkeypatch, seconds=10)) == 0
    assert _summary(tmp_path / "run")["not_segmented"] == ["c4"]
    assert "The time was over before 1 held-out case was segmented" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_of_80_columns_keeps_the_bar_and_the_time_left(width):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, _environ={})
    schedule = Schedule(OptimizerConfig(), 12000, steps_per_epoch=5, val_every=100)
    row = {"step": 4711, "loss": 0.1234, "lr": 1e-4, "images_per_second": 12.3, "data_wait": 0.02}
    with Display(console, schedule) as display:
        for doing in ("Compiling", "Validating", "Held-out"):
            display.state(doing)
        display.step(row)
    last = [line for line in stream.getvalue().replace("\r", "\n").split("\n") if "4711" in line][-1]
    assert "step  4711/12000  loss 0.1234" in last and "left" in last and last.count("━") + last.count("╸") >= 10
    assert ("lr 1.00e-04" in last, "data wait" in last) == {80: (False, False), 100: (False, False), 120: (True, True)}[
        width
    ]
    assert all(f"{doing} " in stream.getvalue() for doing in ("Compiling", "Validating", "Held-out"))


def test_what_matters_least_is_left_out_first():
    parts = ["step 1/2", "loss 0.5", "lr 1.00e-04", "3 images/s", "GPU 1.0/9 GiB", "data wait 0%"]
    assert fit_values(parts, 200) == "  ".join(parts)
    assert fit_values(parts, 61) == "step 1/2  loss 0.5  lr 1.00e-04  3 images/s  GPU 1.0/9 GiB"
    assert fit_values(parts, 20) == "step 1/2  loss 0.5"


def test_the_command_line_of_a_run_has_what_differs_from_the_defaults(tmp_path):
    config = TrainConfig(tmp_path / "my scans", patch_size=(32, 32, 16), augment=False, steps=5)
    line = train_line(config, resume=True)
    assert f"--data_train '{tmp_path}/my scans' --steps 5 --resume --patch_size 32 32 16 --augment False" in line


def test_metrics_of_an_earlier_version_go_on_with_more_columns(tmp_path):
    log_steps(MetricsFile(), tmp_path, {1: 0.5})
    log_steps(MetricsFile(("a",)), tmp_path, {2: 0.25}, Validation(0.75, {"a": 0.75}), start=1)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["val_dice"], row["dice_a"]) for row in rows] == [
        ("0.5", "", ""),
        ("0.25", "0.75", "0.75"),
    ]


def test_curves_of_nothing_of_one_step_and_of_a_constant(tmp_path):
    for rows in ([], [{"step": "1", "loss": "0.5"}], [{"step": str(n), "loss": "0"} for n in range(1, 999)]):
        write_curves(tmp_path / "progress.png", Drawn(rows), ["a"])
        with Image.open(tmp_path / "progress.png") as picture:
            assert picture.size == (1100, 320)


def test_what_is_drawn_of_a_long_training_stays_small_and_true():
    drawn, steps = Drawn(), 20_000
    for step in range(1, steps + 1):
        drawn.add({"step": step, "loss": f"{steps - step}", "val_dice": "0.5" if step % 1000 == 0 else ""})
    assert len(drawn.loss) < 4096 and [row["step"] for row in drawn.validated] == [*range(1000, steps + 1, 1000)]
    # Means of as many steps each, in their order, without those of the mean under way.
    assert np.allclose([step + loss for step, loss in drawn.loss], steps)
    assert np.ptp(np.diff([step for step, _ in drawn.loss])) == 0 and drawn.loss[-1][0] > steps - 8


def test_the_curves_go_on_after_a_resume_and_are_drawn_without_reading_the_file(tmp_path, monkeypatch):
    log_steps(MetricsFile(("a",)), tmp_path, {1: 0.5, 2: 0.25, 3: 0.125})
    log = Curves(("a",))
    log.run(tmp_path, {}, 2)
    monkeypatch.setattr(callbacks, "rows_up_to", lambda *_: pytest.fail("read again"))
    log.validation(2, Validation(0.75, {"a": 0.75}))
    log.step({"step": 3, "loss": 0.0})
    log.end("finished")
    assert log.drawn.loss == [(1, 0.5), (2, 0.25), (3, 0)] and log.drawn.steps == 3
    assert [(row["step"], row["dice_a"]) for row in log.drawn.validated] == [(2, 0.75)]
    assert (tmp_path / "progress.png").exists()


def test_results_stay_on_the_grid_of_the_store_without_the_files_of_the_scans(tmp_path):
    data = _with_images(_dataset(tmp_path / "data"))
    shutil.rmtree(data / "images")
    assert command.run(_config(data, tmp_path / "run", steps=1)) == 0
    affine = nib.load(tmp_path / "run" / "validation" / "c4.nii.gz").affine
    assert np.array_equal(affine, np.array(Store(data / "store").entry("c4").affine))
