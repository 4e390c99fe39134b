"""The train command from a folder on disk to checkpoints, with a small network in place of the real one."""

import csv
import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from mambahome_jax.cli import run_command
from mambahome_jax.commands import train as command
from mambahome_jax.config import MODEL_SIZES, ModelSize
from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, write_prepared
from mambahome_jax.errors import CheckpointError, ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.imaging.intensity import statistics
from mambahome_jax.imaging.volume import Volume, write_volume
from mambahome_jax.patches.store import Store, StoreEntry, write_case, write_index
from mambahome_jax.preprocessing.grids import choose_patch
from mambahome_jax.recipes import AugmentationConfig, Recipe
from mambahome_jax.support.devices import git_state
from mambahome_jax.training import losses
from mambahome_jax.training import train as training
from mambahome_jax.training.losses import dice_ce
from mambahome_jax.training.run_report import dataset_fingerprint
from mambahome_jax.training.setup import (
    case_digests,
    labelled_classes,
    make_augmentation,
    make_setup,
    model_config,
)
from mambahome_jax.training.validation import validation_steps
from mambahome_jax.weights.checkpoint import read_checkpoint_config, read_checkpoint_params
from tests.conftest import golden_path
from tests.training.stand_in import SmallNet, steps_take

SHAPE = (20, 18, 16)


class StandIn(SmallNet):
    def __init__(self, config, *, rngs, precision, metadata):
        super().__init__(config.out_chans)
        self.metadata = nnx.static(metadata)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_networks(monkeypatch)


def small_networks(monkeypatch):
    monkeypatch.setattr(training, "make_network", StandIn)
    size = MODEL_SIZES["MambaHoME_tiny"]
    monkeypatch.setitem(
        MODEL_SIZES, "MambaHoME_tiny", ModelSize(size.model, lr=1e-2, eps=1e-8, strong_lr=1e-2, patch_size=(32, 16, 16))
    )


def _scan(number):
    rng = np.random.default_rng(number)
    label = np.zeros(SHAPE, np.uint8)
    label[4:12, 5 + number % 3 : 12, 3:10] = 1
    return (label * 150.0 - 100 + rng.normal(size=SHAPE) * 20).astype(np.float32), label


def _dataset(root, cases=5, val=("c4",), labelled=True):
    entries, listed = [], []
    for number in range(cases):
        image, label = _scan(number)
        name = f"c{number}"
        entry = StoreEntry(
            id=name,
            shape=SHAPE,
            channels=1,
            spacing=(1.0, 1.0, 1.0),
            affine=tuple(map(tuple, np.eye(4))),
            modality="ct",
            statistics=statistics(image[..., None]),
            body_box=((0, 0, 0), SHAPE),
            class_counts=None,
        )
        entries.append(write_case(root / "store", entry, image[..., None], label if labelled else None))
        split = "val" if name in val else None
        path = f"labels/{name}.nii.gz" if labelled else None
        listed.append(PreparedCase(name, f"images/{name}.nii.gz", path, split, "ct", SHAPE, (1.0, 1.0, 1.0), name))
    write_index(root / "store", entries)
    write_prepared(Prepared(root, "boxes", (1.0, 1.0, 1.0), "RAS", ("ct",), {1: "box"}, tuple(listed)))
    return root


def _config(data, out, **settings):
    settings = {"model": "MambaHoME_tiny", "steps": 4, "val_every": 2, "batch_size": 2} | settings
    return TrainConfig(data, output_dir=out, **settings)


def test_a_run_writes_what_the_design_promises(tmp_path, capsys):
    code = command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run"))
    text = capsys.readouterr().out
    assert code == 0
    assert "boxes: 4 cases to train on, 1 to validate on; ct" in text
    assert "patches of 32 x 16 x 16, 2 a step, fp32" in text and "Compiling" in text
    assert "Next: mambahome infer --data_path SCANS" in text
    files = {"checkpoints", "log.txt", "metrics.csv", "progress.png", "run.json", "tensorboard", "validation"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == files
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"best", "last"}
    config = read_checkpoint_config(tmp_path / "run" / "checkpoints" / "best")
    ranges = config["data"].pop("ranges")
    assert list(ranges) == ["ct"] and ranges["ct"]["cases"] == 4 and list(ranges["ct"]["volumes_ml"]) == ["box"]
    assert config["data"] == {
        "spacing": [1.0, 1.0, 1.0],
        "orientation": "RAS",
        "modality": "ct",
        "labels": {"1": "box"},
        "channels": ["ct"],
        "patch_size": [32, 16, 16],
        "mirror": [],
        "ct_scale": None,
    }
    assert config["model"]["out_chans"] == 2 and config["training"]["lr"] == 1e-2
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert report["status"] == "finished" and report["step"] == 4 and report["best"] == config["best"] | report["best"]
    assert report["data"]["train"] == ["c0", "c1", "c2", "c3"] and report["data"]["val"] == ["c4"]
    assert report["versions"]["jax"] and report["configuration"]["lr"] is None and report["seed"] == 0
    assert report["git"] == git_state()
    prepared = read_prepared(tmp_path / "data")
    digests = case_digests(map(Store(prepared.store).entry, ("c3", "c2", "c1", "c0")))
    assert report["data"]["fingerprint"] == dataset_fingerprint(prepared.labels, digests)
    assert report["data"]["fingerprint"] != dataset_fingerprint(prepared.labels, {"c0": digests["c0"]})
    assert "lr 5.00e-03  " in text and "data wait" in text and "  box  0." in text
    (board,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert board.read_bytes().count(b"\x89PNG") == 2
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val_dice"]) for row in rows] == [False, True, False, True]


def test_stop_and_resume_give_the_bits_of_a_straight_run(tmp_path, monkeypatch):
    data = _dataset(tmp_path / "data")
    assert command.run(_config(data, tmp_path / "straight", steps=6, val_every=3)) == 0
    put, count = training.put_batch, [0]

    def stopping(batch, mesh):
        count[0] += 1
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    monkeypatch.setattr(training, "put_batch", stopping)
    config = _config(data, tmp_path / "run", steps=6, val_every=4)
    assert command.run(config) == 143
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped by a signal"
    assert read_checkpoint_config(tmp_path / "run" / "checkpoints" / "last")["step"] == 3
    with pytest.raises(ConfigError, match="holds a run already"):
        command.run(config)
    with pytest.raises(ConfigError, match=r"lr was 0.01, now 0.5; seed was 0, now 1"):
        command.run(_config(data, tmp_path / "run", steps=6, lr=0.5, seed=1, resume=True))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped by a signal"
    assert command.run(_config(data, tmp_path / "run", steps=6, val_every=4, resume=True)) == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert command.run(_config(data, tmp_path / "run", steps=6, val_every=4, resume=True)) == 0
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert again.pop("seconds") > report.pop("seconds") and again == report and report["loss"] is not None
    straight, resumed = (read_checkpoint_params(tmp_path / n / "checkpoints" / "last") for n in ("straight", "run"))
    for name in ("first", "last"):
        np.testing.assert_array_equal(straight[name]["kernel"], resumed[name]["kernel"])


def test_a_run_of_given_minutes_ends_by_itself_and_tells_the_time_spent(tmp_path, capsys, monkeypatch):
    started = steps_take(monkeypatch, seconds=10) - 30
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=None, val_every=None, max_minutes=2.0)
    assert command.run(config, started) == 0
    assert "2 min, of which 30 s" in capsys.readouterr().out
    spent = read_checkpoint_config(tmp_path / "run" / "checkpoints" / "last")["seconds_spent"]
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (spent, report["step"]) == (100, 7)
    assert report["status"] == "finished" and report["best"] is not None


def test_without_held_out_cases_the_last_weights_are_the_best(tmp_path, capsys):
    data = _dataset(tmp_path / "data", val=())
    assert command.run(_config(data, tmp_path / "run", hold_out=0)) == 0
    assert "5 cases to train on, none to validate on" in capsys.readouterr().out
    best, last = (read_checkpoint_params(tmp_path / "run" / "checkpoints" / name) for name in ("best", "last"))
    jax.tree.map(np.testing.assert_array_equal, best, last)


def test_resume_without_a_checkpoint_starts_anew(tmp_path, capsys):
    assert command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", steps=1, resume=True)) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_trains_straight_from_the_published_layout(tmp_path, capsys):
    for number in range(3):
        image, label = _scan(number)
        folder = tmp_path / "raw" / f"patient{number}"
        folder.mkdir(parents=True)
        write_volume(folder / f"p{number}_ct.nii.gz", Volume(image, np.diag([1.0, 1, 2, 1])))
        write_volume(folder / f"p{number}_labels.nii.gz", Volume(label, np.diag([1.0, 1, 2, 1])))
    assert command.run(_config(tmp_path / "raw", tmp_path / "run", steps=1)) == 0
    assert "at their own spacing" in capsys.readouterr().out
    config = read_checkpoint_config(tmp_path / "run" / "checkpoints" / "best")
    assert config["data"]["spacing"] is None and config["data"]["modality"] == "ct"


def test_a_damaged_validation_case_is_reported_and_the_others_count(tmp_path):
    data = _dataset(tmp_path / "data", val=("c3", "c4"))
    for file in (data / "store" / "c3" / "image").rglob("*"):
        if file.is_file() and file.name != "zarr.json":
            file.write_bytes(file.read_bytes()[:100])
    assert command.run(_config(data, tmp_path / "run", steps=1)) == 1
    report = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [failure["id"] for failure in report["failures"]] == ["c3"] and report["best"]["val_dice"] is not None


def test_numbers_that_are_not_finite_end_the_run_with_a_report(tmp_path, capsys):
    code = command.run(_config(_dataset(tmp_path / "data"), tmp_path / "run", lr=1e38, optimizer="SGD"))
    assert code == 1
    assert "cases of this batch: c" in capsys.readouterr().out
    assert "checkpoints before it are kept" in json.loads((tmp_path / "run" / "run.json").read_text())["status"]


def test_pretrained_weights_of_another_network_are_refused_by_field(tmp_path):
    data, weights = _dataset(tmp_path / "data"), golden_path("mambahome_tiny.pth")
    with pytest.raises(CheckpointError, match=r"depths is \(1, 1, 2, 1\), expected \(1, 1, 1, 1\)"):
        command.run(_config(data, tmp_path / "run", use_pretrained=str(weights)))
    assert "depths" in json.loads((tmp_path / "run" / "run.json").read_text())["status"]


def test_faults_of_data_and_flags_are_told_before_training(tmp_path):
    data = _dataset(tmp_path / "data")
    for settings, message in (
        ({"patch_size": (50, 48, 30)}, r"50 48 30; expected multiples of 16.* such as 48 48 32"),
        ({"classes": 1}, "labels go up to 1; expected at least 2"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"hold_out": 1}, "--hold_out 1; expected 0, or 2 or more"),
        ({"max_minutes": 0.0, "steps": None}, "--max_minutes 0; expected a positive number$"),
        ({"num_devices": 99}, "--num_devices 99"),
        ({"overlap": 1.0}, "--overlap"),
        ({"lr": -1.0}, "--lr -1"),
        ({"max_minutes": 1.0}, "--max_minutes 1 with --steps 4; expected one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.run(_config(data, tmp_path / "run", **settings))
    with pytest.raises(DatasetError, match="no such folder"):
        command.run(_config(tmp_path / "nowhere", tmp_path / "run"))
    with pytest.raises(DatasetError, match="no case to train on among 2"):
        command.run(_config(_dataset(tmp_path / "bare", cases=2, labelled=False), tmp_path / "run"))
    with pytest.raises(CheckpointError, match="nowhere"):
        command.run(_config(data, tmp_path / "run", use_pretrained=str(tmp_path / "nowhere")))


def test_the_strong_recipe_trains_and_its_average_is_the_checkpoint(tmp_path, capsys):
    # The stand-in for the network has no levels to supervise.
    flags = {"recipe": "strong", "warmup_steps": 4, "lr": 1e-3, "deep_supervision": False}
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=2, **flags)
    assert command.run(config) == 0
    text = capsys.readouterr().out
    assert "recipe strong: AdamW, lr 0.001, weight decay 0.05, eps 1e-08, warmup_steps 4, clip_norm 1.0" in text
    assert "dropout 0.1" in text
    assert "mirrored along axis 0, 0 pairs" in text
    written = read_checkpoint_config(tmp_path / "run" / "checkpoints" / "last")
    assert written["data"]["mirror"] == ["LR"]
    settings = written["training"]
    assert settings["ema_decay"] == 0.999 and settings["class_balanced"] and settings["mirror"] == [[0, []]]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(rates, [1e-3 / 4, 1e-3 / 2], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"ema_decay was 0.999, now 0.0"):
        command.run(dataclasses.replace(config, ema_decay=0.0, resume=True))
    with pytest.raises(ConfigError, match=r"dropout was 0.1, now 0.0"):
        command.run(dataclasses.replace(config, dropout=0.0, resume=True))
    assert command.run(dataclasses.replace(config, resume=True)) == 0


def test_mirroring_goes_by_the_names_of_the_structures(tmp_path):
    prepared = read_prepared(_dataset(tmp_path / "data"))
    pairs, lonely = {1: "kidney_left", 2: "kidney_right"}, {1: "left atrium"}
    found, _ = make_augmentation(Recipe(mirror=("LR", "AP")), prepared, pairs)
    assert found.mirror == ((0, ((1, 2),)), (1, ())) and found.affine_probability == 0
    lps = dataclasses.replace(prepared, orientation="SRA", spacing=(0.8, -1.0, 3.0))
    found, _ = make_augmentation(
        Recipe(mirror=("LR",), augmentation=AugmentationConfig(affine_probability=0.5)), lps, pairs
    )
    assert found.mirror == ((1, ((1, 2),)),) and found.voxel_size == (0.8, 1.0, 3.0)
    with pytest.raises(ConfigError, match="left atrium"):
        make_augmentation(Recipe(mirror=("LR",)), prepared, lonely)
    assert make_augmentation(Recipe(mirror=("LR",)), prepared, lonely, explicit=False)[0].mirror == ()
    assert make_augmentation(Recipe(augment=False), prepared, pairs) == (None, ())


def test_classes_that_a_case_s_dataset_never_labelled_reach_the_loss(tmp_path, monkeypatch):
    prepared = read_prepared(_dataset(tmp_path / "data"))
    cases = tuple(dataclasses.replace(c, labelled=() if c.id in ("c0", "c2") else None) for c in prepared.cases)
    write_prepared(dataclasses.replace(prepared, cases=cases))
    seen = []

    def loss(logits, labels, labelled=None, **options):
        jax.debug.callback(lambda values: seen.append(np.asarray(values).tolist()), labelled)
        return dice_ce(logits, labels, labelled, **options)

    monkeypatch.setattr(losses, "dice_ce", loss)
    assert command.run(_config(prepared.root, tmp_path / "run", steps=2, augment=False)) == 0
    jax.effects_barrier()
    # An epoch of two steps holds each of the four cases once.
    assert sorted(row for samples in seen for row in samples) == [[True, False]] * 2 + [[True, True]] * 2
    assert labelled_classes(read_prepared(_dataset(tmp_path / "other")), ("c0", "c1"), 2) is None


def test_steps_schedule_and_split(tmp_path):
    prepared = read_prepared(_dataset(tmp_path / "data", cases=7, val=()))
    setup = make_setup(TrainConfig(prepared.root, epochs=40, skip_val=4, batch_size=2), prepared, None, devices=2)
    # Seven patients: two held out (the first and sixth of an order drawn), five to train on in steps of four.
    assert len(setup.train_cases) == 5 and len(setup.val_cases) == 2
    schedule, optimizer = setup.schedule, setup.schedule.optimizer
    assert (setup.global_batch, schedule.steps_per_epoch, schedule.total_steps, schedule.val_every) == (4, 2, 80, 8)
    assert (optimizer.steps_per_period, optimizer.t_max) == (8, 10)
    assert (optimizer.lr, optimizer.eps, optimizer.weight_decay) == (1e-4, 1e-4, 1e-4)
    # Patches of 32 x 32 x 16, so two cases of one window; forward alone takes a third of a step.
    assert validation_steps(setup) == 2 / (3 * 4)
    setup = make_setup(
        TrainConfig(prepared.root, steps=9, val_every=5, optimizer="Adam", max_val_cases=1),
        prepared,
        prepared,
        devices=1,
    )
    assert len(setup.train_cases) == 7 and len(setup.val_cases) == 1
    schedule, optimizer = setup.schedule, setup.schedule.optimizer
    assert (schedule.total_steps, schedule.val_every) == (9, 5)
    assert (optimizer.steps_per_period, optimizer.t_max, optimizer.eps) == (4, 3, 1e-8)


def test_default_patch_covers_small_volumes_and_no_more():
    config = TrainConfig("data", model="MambaHoME")
    assert choose_patch(config, [(30, 40, 200), (33, 20, 90)]) == (48, 48, 96)
    assert choose_patch(config, [(9, 9, 9)]) == (32, 16, 16)


def test_feature_size_keeps_the_proportions():
    model = model_config(TrainConfig("data", feature_size=24), 2, 5)
    assert model.feat_size == (24, 48, 96, 192) and model.hidden_size == 384
    assert model.in_chans == 2 and model.out_chans == 5


def test_a_run_again_has_the_same_bits(tmp_path):
    data = str(_dataset(tmp_path / "data"))
    flags = ["--data_train", data, "--model", "MambaHoME_tiny", "--steps", "4", "--val_every", "2"]
    for name in ("one", "two"):
        assert run_command("train", [*flags, "--output_dir", str(tmp_path / name)], "train.py") == 0
    one, two = (read_checkpoint_params(tmp_path / name / "checkpoints" / "last") for name in ("one", "two"))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), one, two))
    losses = []
    for name in ("one", "two"):
        with (tmp_path / name / "metrics.csv").open() as file:
            losses.append([(row["step"], row["loss"], row["val_dice"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_resumed_run_still_says_what_it_started_from(tmp_path):
    config = _config(_dataset(tmp_path / "data"), tmp_path / "run", steps=2)
    assert command.run(config) == 0
    file, started_from = tmp_path / "run" / "run.json", {"path": "weights.pth", "loaded": ["first.kernel"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pretrained": started_from}))
    assert command.run(dataclasses.replace(config, resume=True)) == 0
    assert json.loads(file.read_text())["pretrained"] == started_from
