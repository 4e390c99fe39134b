"""A duel from its command line to its table: equal conditions, what is refused, and how it goes on."""

import dataclasses
import importlib
import io
import json
import shutil
import signal
import sys
from types import ModuleType

import jax
import numpy as np
import pytest
from rich.console import Console

import mambahome_jax as mh
from mambahome_jax.commands.duel import cost_table, scores_table
from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.datasets.prepared import read_prepared
from mambahome_jax.errors import ConfigError, DatasetError, TrainingError
from mambahome_jax.flags import DuelConfig, TrainConfig
from mambahome_jax.preprocessing.plan import Setting, StoredPlan
from mambahome_jax.training import contestants, held_out, side_by_side
from mambahome_jax.training import duel as duelling
from mambahome_jax.training.contestants import contestants_of, shared_patch
from mambahome_jax.training.duel import run_duel
from mambahome_jax.training.runs import run_training
from mambahome_jax.training.train import TrainingRun
from tests.commands.test_train import _dataset, _small, small_networks  # noqa: F401

QUIET = Console(quiet=True)
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return _dataset(tmp_path_factory.mktemp("duel") / "data")


def config(data, output, **changes):
    flags = {"against": ("lr=0.001",), "model": "MambaHoME_tiny", "steps": STEPS, "output_dir": output}
    return DuelConfig(data, **flags | changes)


class Trainer:
    """Trains in this process; by number, runs that end otherwise: (exit code, message)."""

    def __init__(self, otherwise=None):
        self.flags, self.slots, self.processes, self.otherwise = [], [], [], otherwise or {}

    def start(self, job, slot, loud):
        self.flags.append(job.flags)
        self.slots.append(slot)
        ending = self.otherwise.get(len(self.flags) - 1)
        code, message = ending or (run_training(job.flags, QUIET).exit_code, "")
        if not ending and code > 128:
            signal.raise_signal(code - 128)
        self.processes.append(Ended(job, slot, code, message))
        return self.processes[-1]


class Ended:
    """A process that has ended, or runs until it is told to end."""

    def __init__(self, job, slot, exitcode, message):
        self.job, self.slot, self.exitcode, self.text, self.process = job, slot, exitcode, message, self

    def message(self):
        return self.text

    def terminate(self):
        self.exitcode = 143 if self.exitcode is None else self.exitcode

    def join(self):
        pass


def fight(config, trainer, console=QUIET):
    """A duel whose trainings are those of a Trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "_start", trainer.start)
        patch.setattr(side_by_side, "_PAUSE", 0.0)
        return run_duel(config, console)


def content(output):
    return json.loads((output / "duel.json").read_text())


def scores(output):
    """What a duel says that does not depend on the clock."""
    found = content(output)
    parts = ("scores", "differences", "structures")
    return found["verdicts"], [[entry[part] for part in parts] for entry in found["contestants"].values()]


def predict_case(network, image, entry, settings):
    """Labels that are near the reference, and others for other weights."""
    size = sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(network.predict.args))
    return (image[..., 0] > size % 60).astype(np.uint8)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A cross-validation of two folds."""
    output = tmp_path_factory.mktemp("finished") / "duel"
    with pytest.MonkeyPatch.context() as patch:
        small_networks(patch)
        patch.setattr(held_out, "predict_case", predict_case)
        return fight(config(data, output, folds=2), Trainer())


@pytest.fixture
def copied(finished, tmp_path):
    """Its folder, for a test to change."""
    return shutil.copytree(finished.folder, tmp_path / "duel")


def test_contestants_differ_in_nothing_but_what_they_say(data, tmp_path):
    words = ("lr=0.001", "mixer=none,experts=ffn")
    first, *others = [one.flags for one in contestants_of(config(data, tmp_path, against=words))[0]]
    assert first.steps == STEPS and first.patch_size == (32, 16, 16) and first.resume
    for flags, own in zip(others, ({"lr": 0.001}, {"mixer": "none", "experts": "ffn"}), strict=True):
        assert flags == dataclasses.replace(first, **own, given=flags.given)


def test_every_case_is_compared(finished):
    first, other = finished.standings
    assert (first.name, other.name) == ("MambaHoME_tiny", "lr=0.001")
    assert finished.exit_code == 0 and not finished.failures
    dice = {row.case: row.dice for row in first.seeds[0]}
    differences = {row.case: row.dice - dice[row.case] for row in other.seeds[0]}
    assert (
        len(differences) == 5
        and any(differences.values())
        and other.differences["dice"].of_cases == pytest.approx(differences)
    )
    assert other.structures["box"] == other.differences["dice"]
    assert first.mean("dice") == pytest.approx(np.mean([*dice.values()]))
    for one in finished.standings:
        assert len(one.curves) == 2 and all(curve[-1][1] == STEPS for curve in one.curves)
        assert one.cost.parameters > 0 and one.cost.images_per_second > 0 and one.cost.steps == STEPS


def test_the_tables_fit_into_80_columns(finished):
    console = Console(width=80, record=True, file=io.StringIO())
    first, other = finished.standings
    long = dataclasses.replace(other, name="mixer=none,experts=ffn,deep_supervision=True,lr=0.001")
    cost = other.cost._replace(
        parameters=100.95, gib=135.29, images_per_second=123.45, compile_seconds=100, steps=80000
    )
    for table in (scores_table, cost_table):
        console.print(table([first, dataclasses.replace(long, cost=cost)]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("mixer=none,experts=ffn", "deep_supervision=True", "lr=0.001", "MambaHoME_tiny"):
        assert sum(words in line for line in text.splitlines()) == 2 + (words == "MambaHoME_tiny")
    assert "images" in text and "difference" in text and first.cost.training_minutes > 0


def test_the_page_says_what_stands_and_what_each_was_given(finished):
    page = finished.report.read_text()
    assert f"{finished.verdicts[0]}." in page and finished.verdicts[0].startswith("lr=0.001 ")
    assert page.count("<polyline") == 2 * 4 and 'id="cost"' in page
    given = page[page.index('<section id="given"') :]
    assert given.index(">lr</th>") < given.index("The same for all") < given.index(">patch_size</th>")


def test_a_finished_duel_trains_nothing(finished, data, copied):
    trainer = Trainer()
    again = fight(config(data, copied, folds=2), trainer)
    assert trainer.flags == [] and scores(copied) == scores(finished.folder) and again.verdicts == finished.verdicts
    with pytest.raises(ConfigError, match="duel of other settings: MambaHoME_tiny: steps was 3, now 4"):
        fight(config(data, copied, folds=2, steps=4), trainer)


def test_others_and_more_seeds_may_join_and_who_fails_is_told(finished, data, copied):
    refused = (2, f"{copied}/weights.pth: no room on the device")
    trainer = Trainer(dict.fromkeys(range(4), refused) | {1: (1, "")})
    more = config(data, copied, folds=2, against=("eps=0.01", "lr=0.001"), seeds=2)
    result = fight(more, trainer)
    trained = [(flags.eps, flags.lr, flags.seed, flags.fold_seed) for flags in trainer.flags]
    assert trained == [(0.01, None, 0, 0), (None, None, 1, 0), (0.01, None, 1, 0), (None, 0.001, 1, 0)]
    assert result.exit_code == 1 and [one.name for one in result.standings] == ["MambaHoME_tiny", "lr=0.001"]
    assert result.failures["eps=0.01, seed 0"] == refused[1]
    assert result.failures["MambaHoME_tiny, seed 1"] == "fold_0: not begun; fold_1: not begun"
    page = result.report.read_text()
    assert "weights.pth: no room on the device" in page and str(copied.parent) not in page
    assert [*content(copied)["contestants"]] == ["MambaHoME_tiny", "lr=0.001", "eps=0.01"]


def test_a_process_that_the_system_ends_fails_alone(data, copied, tmp_path, monkeypatch):
    (tmp_path / "ending.py").write_text("import os\n\ndef end(*_):\n    os.kill(os.getpid(), 9)\n")
    (tmp_path / "script.py").write_text("raise SystemExit('it ran anew')")
    monkeypatch.syspath_prepend(tmp_path)
    main = ModuleType("__main__")
    main.__file__ = str(tmp_path / "script.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(side_by_side, "train_apart", importlib.import_module("ending").end)
    shutil.rmtree(copied / "lr=0.001")
    result = run_duel(config(data, copied, folds=2), QUIET)
    said = "its process was ended by SIGKILL, most likely for want of memory"
    assert result.failures == {"lr=0.001, seed 0": said} and result.exit_code == 1
    assert sys.modules["__main__"] is main


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(duelling, "visible_gpus", lambda: ["5", "GPU-7"])


def printed(width=200):
    return Console(width=width, record=True, file=io.StringIO())


@pytest.mark.usefixtures("two_gpus")
def test_trainings_side_by_side_are_of_one_fold_each_and_have_the_same_scores(finished, data, copied, monkeypatch):
    shutil.rmtree(copied / "lr=0.001")
    # The others have ended, but were stopped while their scores were counted together.
    shutil.rmtree(copied / "MambaHoME_tiny" / "seed_0" / "cross_validation")
    monkeypatch.setattr(held_out, "predict_case", predict_case)
    trainer, console = Trainer(), printed()
    assert fight(config(data, copied, folds=2, at_once=3), trainer, console).exit_code == 0
    assert [flags.fold for flags in trainer.flags] == [0, 1, None] and scores(copied) == scores(finished.folder)
    assert [(slot.gpu, slot.memory) for slot in trainer.slots[:2]] == [("5", 0.25), ("GPU-7", 0.25)]
    said = console.export_text().splitlines()
    log = copied / "lr=0.001" / "seed_0" / "fold_0" / "log.txt"
    assert f"Training 3 of 4: lr=0.001, seed 0, fold 0 on GPU 5; see {log}" in said
    begin = "lr=0.001, seed 0, fold 0 ended with exit code 0, "
    (line,) = [line for line in said if line.startswith(begin)]
    others = "lr=0.001, seed 0, fold 1 on GPU GPU-7, MambaHoME_tiny, seed 0, scores of all folds on GPU 5"
    assert line.endswith(f" after the start. In progress: {others}")


@pytest.mark.usefixtures("two_gpus")
def test_a_first_contestant_that_fails_ends_those_beside_it(data, tmp_path):
    trainer = Trainer({0: (2, "no room"), 1: (None, ""), 2: (None, ""), 3: (None, "")})
    with pytest.raises(TrainingError, match="MambaHoME_tiny, the first contestant, could not be trained: no room"):
        fight(config(data, tmp_path / "duel", seeds=3, at_once=2), trainer)
    assert [ended.exitcode for ended in trainer.processes] == [2, 143, 143, 143]


@pytest.mark.usefixtures("two_gpus")
def test_a_fold_that_is_refused_takes_the_others_of_its_run_along(data, copied):
    shutil.rmtree(copied / "lr=0.001")
    trainer, console = Trainer(dict.fromkeys(range(9), (2, "no room"))), printed()
    more = config(data, copied, folds=2, against=("lr=0.001", "eps=0.01"))
    result = fight(more, trainer, console)
    assert result.failures == {"lr=0.001, seed 0": "no room", "eps=0.01, seed 0": "no room"}
    assert "lr=0.001, seed 0, fold 0: no room" in console.export_text().splitlines()


@pytest.mark.usefixtures("two_gpus")
def test_minutes_that_trainings_share_are_called_so(data, tmp_path):
    timed = config(data, tmp_path / "duel", steps=None, max_minutes=2.0, folds=3, at_once=2)
    trainer, console = Trainer(dict.fromkeys(range(9), (1, ""))), printed()
    with pytest.raises(TrainingError):
        fight(timed, trainer, console)
    assert {flags.max_minutes for flags in trainer.flags} == {2.0}
    said = (
        "Minutes and images/s are those of up to 2 trainings at the same time on each device. 6 trainings do not fill"
    )
    assert said in console.export_text()
    with pytest.raises(ConfigError, match="other settings: at_once was 2, now 1, which share the minutes otherwise"):
        fight(dataclasses.replace(timed, at_once=1), trainer)


def test_tables_and_page_say_that_speeds_were_shared(finished, data, copied):
    result = fight(config(data, copied, folds=2, at_once=2), Trainer())
    said = "Minutes and images/s are those of up to 2 trainings at the same time on each device"
    assert result.shared == said and said in result.report.read_text()
    assert finished.shared == "" and said not in finished.report.read_text()


def test_what_was_not_trained_alike_is_said(finished, data, copied):
    assert "alike" not in finished.verdicts[0]
    for folder, changes in (("MambaHoME_tiny", {"device": "4 x GPU"}), ("lr=0.001", {"training": {"global_batch": 8}})):
        file = copied / folder / "seed_0" / "fold_1" / "run.json"
        report = json.loads(file.read_text())
        report["training"] |= changes.pop("training", {})
        file.write_text(json.dumps(report | changes))
    assert (
        fight(config(data, copied, folds=2), Trainer())
        .verdicts[0]
        .endswith("; not trained alike: device, global_batch")
    )


def test_a_duel_of_a_version_with_fewer_flags_goes_on(finished, data, copied):
    written = content(copied)
    for entry in written["contestants"].values():
        del entry["flags"]["tracker"]
    (copied / "duel.json").write_text(json.dumps(written))
    assert fight(config(data, copied, folds=2), Trainer()).exit_code == 0


@pytest.mark.parametrize(
    "content",
    [
        *("[]", '{"contestants": []}', '{"configuration": 3}', '{"contestants": {"lr=0.001": 1}}'),
        *('{"contestants": {"lr=0.001": {}}}', '{"contestants": {"lr=0.001": {"flags": [1]}}}', '{"contestants"'),
    ],
)
def test_a_record_that_is_none_is_refused_by_name(finished, data, copied, content):
    (copied / "duel.json").write_text(content)
    with pytest.raises(DatasetError, match=r"duel.json: .*Remove it: what was trained stays") as raised:
        fight(config(data, copied, folds=2), Trainer())
    assert "expected" in str(raised.value) or "JSON" in str(raised.value)
    (copied / "duel.json").unlink()
    trainer = Trainer()
    assert fight(config(data, copied, folds=2), trainer).exit_code == 0 and trainer.flags == []


def test_a_first_contestant_that_fails_leaves_nothing_to_compare(data, tmp_path):
    trainer = Trainer(dict.fromkeys(range(2), (2, "no room")))
    with pytest.raises(TrainingError, match="MambaHoME_tiny, the first contestant, could not be trained: no room"):
        fight(config(data, tmp_path / "duel", seeds=2), trainer)
    assert len(trainer.flags) == 1


def test_one_stopped_by_a_signal_goes_on_to_the_same_scores(finished, data, copied, monkeypatch):
    shutil.rmtree(copied / "lr=0.001")
    monkeypatch.setattr(held_out, "predict_case", predict_case)
    started = TrainingRun.step_started

    def step_started(run, metrics):
        started(run, metrics)
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "step_started", step_started)
        result = fight(config(data, copied, folds=2), Trainer())
    assert result.exit_code == 143 and result.standings == () and content(copied)["status"] == "running"
    assert fight(config(data, copied, folds=2), Trainer()).exit_code == 0
    assert scores(copied) == scores(finished.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": ()}, "--against names nobody"),
        ({"against": ("UNETR",)}, r"--against UNETR; expected a network \(MambaHoME, .*SegMamba.* such as mixer=conv"),
        ({"against": ("mixer=lstm",)}, "--against mixer=lstm: mixer is 'lstm'; expected one of scan, conv, none"),
        ({"against": ("lr=fast",)}, "--against lr=fast: lr is 'fast'; expected a value of --lr, see mambahome train"),
        ({"against": ("mixer=conv,seed=3",)}, "--seed is the same for all contestants"),
        ({"against": ("num_devices=1",)}, "--num_devices is the same for all contestants"),
        ({"against": ("SegMamba,lr=1",)}, "--against SegMamba,lr=1; expected a network .* or model=SegMamba,lr=0.001"),
        ({"against": ("lr=1,lr=2",)}, "--against lr=1,lr=2: a flag has two values; expected one"),
        ({"against": ("mixer=conv", "mixer=conv")}, "mixer=conv takes part twice"),
        ({"against": ("MambaHoME_tiny",)}, "MambaHoME_tiny takes part twice"),
        ({"against": ("mixer=scan",)}, "mixer=scan changes nothing of MambaHoME_tiny"),
        ({"against": ("model=SegMamba,mixer=conv",)}, "this network has no mixer. Leave --mixer out"),
        ({"folds": 0}, "--folds 0; expected 1 or more"),
        ({"seeds": 0}, "--seeds 0; expected 1 or more"),
        ({"at_once": 0}, "--at_once 0; expected 1 or more"),
        ({"max_minutes": 1.0}, "--steps 3 with --max_minutes 1; expected one of the two"),
        ({"steps": 0}, "--steps 0; expected a positive number"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        fight(config(data, tmp_path / "duel", **changes), Trainer())
    assert not (tmp_path / "duel").exists()


def test_a_folder_that_is_not_preprocessed(tmp_path):
    with pytest.raises(ConfigError, match="is not preprocessed; expected a folder that mambahome preprocess wrote"):
        mh.duel(folder=tmp_path, against=("SegMamba",))


def test_values_are_read_as_on_the_command_line(data, tmp_path):
    words = ("affine_scale=0.8 1.2,deep_supervision=True", "recipe=strong", "model=SegMamba,feature_size=4")
    larger = "patch_size=64 32 32"
    found, lines = contestants_of(config(data, tmp_path, against=(*words, larger)))
    _, one, strong, segmamba, other = [each.flags for each in found]
    assert other.patch_size == (64, 32, 32) and lines[0].endswith(f" for all but {larger}")
    assert one.affine_scale == (0.8, 1.2) and one.deep_supervision is True
    assert strong.recipe == "strong" and strong.patch_size == one.patch_size
    assert (segmamba.model, segmamba.feature_size) == ("SegMamba", 4)
    assert [each.folder for each in found[1:3]] == ["affine_scale=0.8_1.2,deep_supervision=True", "recipe=strong"]


def test_a_twin_that_the_plan_chose_is_named(data, tmp_path, monkeypatch):
    settings = {"model": "MambaHoME_small", "mixer": "none"}
    plan = StoredPlan({name: Setting(value, "") for name, value in settings.items()}, "a CPU", False)
    monkeypatch.setattr(contestants, "planned_settings", lambda flags: plan)
    found = contestants_of(config(data, tmp_path, model=None, against=("mixer=scan", "SegMamba")))[0]
    assert [each.name for each in found] == ["MambaHoME_small,mixer=none", "mixer=scan", "SegMamba"]
    assert [contestants.as_planned(each.flags).mixer for each in found] == ["none", "scan", "scan"]


def test_a_recipe_that_leaves_the_plan_aside_keeps_its_network_and_sizes(data, tmp_path, monkeypatch):
    settings = {"model": "MambaHoME_small", "patch_size": (48, 48, 48), "batch_size": 3, "recipe": "strong"}
    plan = StoredPlan({name: Setting(value, "") for name, value in settings.items()}, "a CPU", False)
    monkeypatch.setattr(contestants, "planned_settings", lambda flags: plan)
    words = {"model": None, "against": ("recipe=published", "SegMamba")}
    found = [contestants.as_planned(each.flags) for each in contestants_of(config(data, tmp_path, **words))[0]]
    sizes = [(flags.model, flags.recipe, flags.patch_size, flags.batch_size, flags.steps) for flags in found]
    assert sizes == [
        ("MambaHoME_small", "strong", (48, 48, 48), 3, STEPS),
        ("MambaHoME_small", "published", (48, 48, 48), 3, STEPS),
        ("SegMamba", "strong", (48, 48, 48), 3, STEPS),
    ]


def test_minutes_are_of_each_network_and_begin_with_its_first_step(data, tmp_path):
    timed = config(data, tmp_path, steps=None, max_minutes=2.0)
    for folds, minutes in ((1, 2.0), (3, 6.0)):
        for one in contestants_of(dataclasses.replace(timed, folds=folds))[0]:
            assert (one.flags.max_minutes, one.flags.minutes_from, one.minutes) == (minutes, "first_step", 2.0)


def test_batches_are_equal_or_fill_the_memory(data, tmp_path, monkeypatch):
    settings = {"patch_size": (96, 96, 96), "batch_size": 6, "model": "MambaHoME_tiny", "recipe": "strong"}
    plan = StoredPlan({name: Setting(value, "") for name, value in settings.items()}, "a GPU of 8 GiB", False)
    monkeypatch.setattr(contestants, "planned_settings", lambda flags: plan)

    def batches(equal):
        found, lines = contestants_of(config(data, tmp_path, against=("SegMamba", "mixer=none"), equal=equal))
        return [contestants.as_planned(each.flags).batch_size for each in found], lines[1:]

    assert batches("images") == ([6, 6, 6], [])
    (first, large, twin), lines = batches("memory")
    assert first == 6 and large < twin
    assert lines == [f"Batches: MambaHoME_tiny 6, SegMamba {large}, mixer=none {twin}"]


def test_the_patch_is_one_that_all_take(data):
    prepared = dataclasses.replace(read_prepared(data), spacing=(1.0, 1.0, 6.0))
    thick = TrainConfig(data, model="MambaHoME_tiny", strides="auto", patch_size=(32, 32, 8))
    assert shared_patch([thick], prepared) == ((32, 32, 8), (32, 32, 8))
    patch, wanted = shared_patch([thick, dataclasses.replace(thick, strides="published")], prepared)
    assert wanted == (32, 32, 8) and patch == (32, 32, 16)
    assert MODEL_SIZES["MambaHoME_tiny"].model.check_size(patch) is None


def test_the_seconds_of_a_resumed_run_go_on(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,seconds,val_dice\n1,10,\n2,70,0.5\n3,5,\n4,50,0.6\n")
    curve = duelling._curve([*duelling._rows(tmp_path / "metrics.csv")])
    assert curve == [(pytest.approx(70 / 60), 2, 0.5), (pytest.approx(120 / 60), 4, 0.6)]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (137, "SIGKILL, most likely for want of memory"),
        (139, "SIGSEGV"),
        (0xC0000005, "the system, with exit code 0xc0000005"),  # of Windows, for memory that is not there
    ],
)
def test_what_ended_a_process_is_named_on_any_system(code, said):
    assert duelling._ender(code) == said
