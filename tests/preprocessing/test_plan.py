"""The plan: nnU-Net's spacing rule, grids of known datasets, settings that are given, plan.json."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax import cli
from mambahome_jax.config import MODEL_SIZES, ModelConfig
from mambahome_jax.errors import DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing.fingerprint import Fingerprint
from mambahome_jax.preprocessing.grids import choose_grids
from mambahome_jax.preprocessing.plan import (
    Machine,
    Setting,
    StoredPlan,
    _digest,
    follow_plan,
    make_plan,
    plan_lines,
    read_plan,
    target_spacing,
    train_words,
    write_plan,
)
from mambahome_jax.preprocessing.step_memory import parameters, step_gib

GOLDENS = json.loads((Path(__file__).parent.parent / "goldens" / "nnunet_plans.json").read_text())
GPU, CPU = Machine(140.0), Machine()
SIDES = {"pairs": (("left lung", "right lung"),)}
HEART = ("right ventricle", "left ventricle")
BRAIN = ("left lateral ventricle", "right lateral ventricle")


def fingerprint(spacing, shape, cases=1, **fields):
    return Fingerprint(
        np.tile(np.array(spacing, float), (cases, 1)), np.tile(np.array(shape, float), (cases, 1)), **fields
    )


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden["name"])
def test_spacing_is_that_of_nnunets_planner(golden):
    spacings, shapes = np.array(golden["spacings"]), np.array(golden["shapes"], float)
    target, _ = target_spacing(spacings, shapes)
    assert np.allclose(target, golden["target"], rtol=0, atol=1e-9)
    plan = make_plan(Fingerprint(spacings, shapes), GPU)
    assert np.allclose(plan.spacing.value, golden["target"], rtol=2e-6)
    assert all(setting.reason for setting in plan.settings().values())


@pytest.mark.parametrize(
    ("shape", "spacing", "patch", "strides"),
    [
        ((36, 50, 35), (1, 1, 1), (48, 64, 48), "222 222 222 222"),
        ((190, 142, 88), (0.625, 0.625, 0.625), (96, 96, 96), "222 222 222 222"),
        ((256, 216, 10), (1.5, 1.5, 10), (256, 224, 10), "221 221 222 221"),
        ((512, 512, 100), (0.7, 0.7, 5), (192, 192, 24), "221 221 222 222"),
        ((240, 240, 155), (1, 1, 1), (96, 96, 96), "222 222 222 222"),
        ((320, 320, 20), (0.6, 0.6, 3.6), (208, 208, 20), "221 221 222 222"),
        ((512, 512, 93), (0.8, 0.8, 2.5), (144, 144, 48), "221 222 222 222"),
    ],
)
def test_plans_of_known_datasets(shape, spacing, patch, strides):
    plan = make_plan(fingerprint(spacing, shape), GPU)
    assert plan.spacing.value == spacing  # thick slices stay whole
    assert plan.patch_size.value == patch
    assert " ".join("".join(map(str, stride)) for stride in plan.strides.value) == strides
    multiples = ModelConfig(strides=plan.strides.value, kernel_sizes=plan.kernel_sizes.value).multiples
    assert not any(n % m for n, m in zip(patch, multiples, strict=True))


@pytest.mark.parametrize("shape", [(16, 16, 16), (8, 8, 8), (1, 16, 16), (16, 16, 1)])
def test_train_takes_the_patch_planned_for_tiny_scans(shape):
    plan = make_plan(fingerprint((1, 1, 1), shape), CPU)
    followed = follow_plan(TrainConfig(Path("ready")), plan.settings())
    planned = {name: setting.value for name, setting in plan.settings().items()}
    grids = choose_grids(followed, [shape], (1.0, 1.0, 1.0), planned)
    assert grids.patch_size == plan.patch_size.value and grids.strides == plan.strides.value


def test_batch_and_model_follow_the_machine():
    atrium = fingerprint((0.625,) * 3, (190, 142, 88), cases=80)
    assert make_plan(atrium, GPU).batch_size.value == 4
    assert make_plan(fingerprint((1, 1, 1), (36, 50, 35)), GPU).batch_size.value == 8
    assert make_plan(atrium, CPU).model.value == "MambaHoME_tiny"
    assert make_plan(atrium, Machine(2.0)).model.value == "MambaHoME_tiny"
    small = make_plan(atrium, Machine(2.0), {"model": Setting("MambaHoME", "given")})
    assert small.model == Setting("MambaHoME", "given") and np.prod(small.patch_size.value) < 300_000
    assert make_plan(atrium, CPU).length.value["minutes"] > make_plan(atrium, GPU).length.value["minutes"]


@pytest.mark.parametrize("gib", [4, 6, 8, 11, 16, 24, 40, 80])
@pytest.mark.parametrize("share", [0.75, 0.4])
def test_a_step_is_planned_to_fit_what_jax_takes_of_the_card(gib, share):
    machine, counts = Machine(gib, share), []
    assert Machine.named(str(machine)) == machine
    for spacing, shape in (((1, 1, 1), (36, 50, 35)), ((0.7, 0.7, 5), (512, 512, 100)), ((1, 1, 1), (240, 240, 155))):
        for model in ("MambaHoME_tiny", "MambaHoME_small"):
            plan = make_plan(fingerprint(spacing, shape), machine, {"model": Setting(model, "given")})
            network = MODEL_SIZES[model].model.replace(strides=plan.strides.value, mixer=plan.mixer.value)
            needed = step_gib(network, plan.patch_size.value, plan.batch_size.value)
            assert needed <= 0.9 * share * gib and f"{needed:.1f} of {gib} GiB" in plan.batch_size.reason
            counts.append(plan.batch_size.value)
            larger = make_plan(fingerprint(spacing, shape), Machine(4 * gib, share), {**plan.settings()})
            assert larger.batch_size == plan.batch_size  # what is given stays
    assert max(counts) > 1


def test_the_estimate_of_a_step_grows_with_what_it_holds():
    small, patch = MODEL_SIZES["MambaHoME_small"].model, (96, 96, 96)
    gib = step_gib(small, patch, 2)
    thick = small.replace(strides=((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2)))
    assert gib < step_gib(small, patch, 3) < 1.5 * gib
    assert gib < step_gib(thick, patch, 2)
    assert gib < step_gib(small, patch, 2, "tf32") < step_gib(small, patch, 2, "fp32")
    assert abs(parameters(MODEL_SIZES["MambaHoME"].model) / 170_128_101 - 1) < 0.02


def test_what_is_given_stays_and_the_rest_follows():
    given = {"spacing": Setting((3.0, 3.0, 0.0), "by hand"), "patch_size": Setting((32, 32, 32), "by hand")}
    plan = make_plan(fingerprint((1, 1, 5), (300, 300, 60)), GPU, given)
    assert (plan.spacing, plan.patch_size) == (given["spacing"], given["patch_size"])
    assert plan.strides.value == ((2, 2, 2),) * 4
    assert make_plan(fingerprint((1, 1, 5), (300, 300, 60)), GPU, plan.settings()) == plan


@pytest.mark.parametrize(
    ("fields", "width", "mirror"),
    [
        ({}, 300, "LR"),
        ({}, 40, "none"),
        (SIDES, 40, "LR"),
        ({"alone": ("left arm",)}, 300, "none"),
        ({"pairs": (HEART,)}, 300, "none"),
        ({"pairs": (BRAIN,)}, 300, "LR"),
        ({"pairs": (HEART, *SIDES["pairs"])}, 300, "LR"),
    ],
)
def test_mirrored_where_mirrored_scans_can_occur(fields, width, mirror):
    assert make_plan(fingerprint((1, 1, 1), (width, 100, 100), **fields), GPU).mirror.value == (mirror,)


def test_a_thousand_cases_take_no_time():
    rng = np.random.default_rng(0)
    many = Fingerprint(rng.uniform(0.5, 5, (1000, 3)), rng.integers(20, 600, (1000, 3)).astype(float))
    started = time.process_time()
    make_plan(many, GPU)
    assert time.process_time() - started < 2


def test_plan_json_comes_back(tmp_path):
    numbers = fingerprint((1.5, 1.5, 10), (256, 216, 10), cases=3, **SIDES)
    plan = make_plan(numbers, CPU)
    write_plan(tmp_path / "plan.json", plan, CPU, numbers)
    assert read_plan(tmp_path / "plan.json")[:3] == (plan.settings(), "a CPU", False)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["machine"] == "a CPU" and content["fingerprint"]["cases"] == 3
    assert set(content["patch_size"]) == {"value", "reason"}
    edited = content | {"patch_size": {"value": [64, 64, 10], "reason": "by hand"}}
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    stored = read_plan(tmp_path / "edited.json")
    assert stored.edited and stored.settings["patch_size"] == Setting((64, 64, 10), "by hand")
    for name, value in {
        "patch_size": [16, 16],
        "spacing": "fine",
        "model": "huge",
        "strides": [[2, 2, 3]] * 4,
        "batch_size": 0,
        "length": {"minutes": -1},
        "mirror": ["up"],
        "hold_out": 1,
        "recipe": None,
    }.items():
        content_of = content | {name: {"value": value, "reason": "by hand"}}
        (tmp_path / "bad.json").write_text(json.dumps(content_of))
        with pytest.raises(DatasetError, match=rf"bad.json: {name} is"):
            read_plan(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps(content | {"spacing": {"value": [1, 1, 1], "reason": None}}))
    with pytest.raises(DatasetError, match=r"'reason': None}; expected {\"value\": ..., \"reason\": ...}"):
        read_plan(tmp_path / "bad.json")
    for change in ({"version": 9}, {"patch": {"value": 1}}, {"model": "MambaHoME"}):
        (tmp_path / "bad.json").write_text(json.dumps(content | change))
        with pytest.raises(DatasetError, match=r"bad\.json"):
            read_plan(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("patients", "every"), [(1, 5), (10, 5), (25, 5), (29, 5), (30, 6), (48, 9), (80, 16), (208, 20), (1000, 20)]
)
def test_few_patients_are_held_out_so_that_most_are_trained_on(patients, every):
    numbers = fingerprint((1, 1, 1), (50, 50, 50), cases=2 * patients, patients=patients)
    settings = make_plan(numbers, GPU).settings()
    assert settings["hold_out"].value == every
    data = Path("ready")
    assert follow_plan(TrainConfig(data), settings).hold_out == every
    assert follow_plan(TrainConfig(data, hold_out=0, given=("hold_out",)), settings).hold_out == 0
    # The folds, or cases of their own, say who is held out.
    assert follow_plan(TrainConfig(data, folds=5), settings).hold_out == TrainConfig.hold_out
    assert follow_plan(TrainConfig(data, data_val=Path("val")), settings).hold_out == TrainConfig.hold_out


def test_plans_are_equal_for_equal_numbers():
    numbers = fingerprint((0.8, 0.8, 2.5), (512, 512, 93), cases=5)
    assert make_plan(numbers, GPU) == make_plan(dataclasses.replace(numbers), Machine(140.0))


def test_a_training_follows_what_no_flag_decides():
    settings = make_plan(fingerprint((1.5, 1.5, 10), (256, 216, 10), cases=50), GPU).settings()
    data = Path("ready")
    followed = follow_plan(TrainConfig(data), settings)
    assert (followed.model, followed.recipe, followed.strides) == ("MambaHoME_small", "strong", "auto")
    assert followed.patch_size == (256, 224, 10) and followed.max_minutes == settings["length"].value["minutes"]
    assert followed.batch_size == settings["batch_size"].value and followed.mirror == ("LR",)
    # Given at its default, a flag wins all the same.
    asked = follow_plan(TrainConfig(data, model="MambaHoME", steps=5, given=("model", "steps", "batch_size")), settings)
    assert (asked.model, asked.steps, asked.max_minutes, asked.batch_size) == ("MambaHoME", 5, None, 2)
    assert follow_plan(TrainConfig(data, patch_size=(48, 48, 10)), settings).patch_size == (48, 48, 10)
    for published in (TrainConfig(data, given=("recipe",)), TrainConfig(data, recipe="published", given=("recipe",))):
        assert follow_plan(published, settings) == published
    assert follow_plan(TrainConfig(data), {}) == TrainConfig(data)
    epochs = follow_plan(TrainConfig(data), {"length": Setting({"epochs": 3}, "")})
    assert (epochs.epochs, epochs.max_minutes) == (3, None)
    # The networks of --members share --max_minutes, but each is planned so many.
    minutes = settings["length"].value["minutes"]
    assert follow_plan(TrainConfig(data, members=3), settings).max_minutes == 3 * minutes


@pytest.mark.parametrize("length", [{"minutes": 12.5}, {"epochs": 30}, {"steps": 1_000_000}])
@pytest.mark.parametrize("recipe", ["published", "strong"])
def test_the_command_line_of_a_plan_trains_as_the_plan_alone_does(recipe, length):
    settings = make_plan(fingerprint((1.5, 1.5, 10), (256, 216, 10), cases=50), GPU).settings()
    settings |= {"recipe": Setting(recipe, "by hand"), "length": Setting(length, "by hand")}
    flags = cli.parse("train", train_words(Path("ready"), settings))
    followed, alone = (follow_plan(each, settings, str(GPU)) for each in (flags, TrainConfig(Path("ready"))))
    assert dataclasses.replace(followed, given=()) == alone
    assert {"model", "max_minutes" if "minutes" in length else next(iter(length))} <= {*flags.given}


def test_thick_slices_are_planned_without_mamba_unless_a_flag_asks_for_it():
    thin, thick = (make_plan(fingerprint(mm, (256, 216, 10)), GPU) for mm in ((1.5, 1.5, 3), (1.5, 1.5, 10)))
    assert (thin.mixer.value, thick.mixer.value) == ("scan", "none")
    settings, ready = thick.settings(), Path("ready")
    assert follow_plan(TrainConfig(ready), settings).mixer == "none"
    assert follow_plan(TrainConfig(ready, mixer="conv"), settings).mixer == "conv"
    assert follow_plan(TrainConfig(ready, given=("mixer",)), settings).mixer == "scan"
    # Networks that have no such layer are refused with another mixer than the default.
    assert follow_plan(TrainConfig(ready, model="SegMamba"), settings).mixer == "scan"
    assert (
        make_plan(fingerprint((1.5, 1.5, 10), (256, 216, 10)), GPU, {"model": Setting("SegMamba", "")}).mixer.value
        == "scan"
    )
    # The memory that the layers would take goes to more patches, and a flag that asks for them has fewer again.
    small = Machine(gpu_gib=6)
    plan = make_plan(fingerprint((1.5, 1.5, 10), (256, 216, 10)), small)
    with_scan = follow_plan(TrainConfig(ready, given=("mixer",)), plan.settings(), str(small))
    assert with_scan.batch_size < plan.batch_size.value


def test_a_plan_of_a_version_without_the_mixer_is_one_with_mamba(tmp_path):
    """As training reads it, so that --plan makes the network that the same file made before."""
    thick = fingerprint((1.5, 1.5, 10), (256, 216, 10))
    settings = make_plan(thick, GPU).settings()
    del settings["mixer"]
    written = {name: setting._asdict() for name, setting in settings.items()}
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, **written, "digest": _digest(settings)}))
    stored = read_plan(tmp_path / "plan.json")
    assert not stored.edited and follow_plan(TrainConfig(Path("ready")), stored.settings).mixer == "scan"
    assert make_plan(thick, GPU, stored.settings).mixer.value == "scan"
    # Where a person left only some settings, the rest is chosen.
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, "recipe": {"value": "strong"}}))
    assert make_plan(thick, GPU, read_plan(tmp_path / "plan.json").settings).mixer.value == "none"


def test_the_batch_follows_a_given_network_or_patch():
    settings = make_plan(fingerprint((1, 1, 1), (240, 240, 155), cases=50), Machine(16)).settings()
    settings = settings | {"batch_size": Setting(5, "by hand")}

    def batch(machine="a GPU of 16 GiB", **given):
        return follow_plan(TrainConfig(Path("ready"), **given, given=tuple(given)), settings, machine).batch_size

    assert batch() == batch(patch_size=settings["patch_size"].value) == batch(model="MambaHoME_small") == 5
    assert batch(model="MambaHoME") == 4 and batch(patch_size=(128, 128, 128)) == 1
    assert batch(model="MambaHoME", batch_size=7) == 7
    assert batch("a CPU", model="MambaHoME") == 2 and batch("another", model="MambaHoME") == 5


def test_what_a_plan_decided_is_said():
    flags, stored = TrainConfig(Path("ready")), StoredPlan({"model": Setting("MambaHoME_tiny", "")}, "a CPU", False)
    assert plan_lines(flags, flags, stored, "cpu") == []
    followed = follow_plan(flags, stored.settings)
    first, second = plan_lines(flags, followed, stored, "cpu")
    assert "model MambaHoME_tiny" in first and "--recipe published trains as the paper" in first
    assert second.startswith("On a CPU")
    assert "this machine is of another kind" in plan_lines(flags, followed, stored, "gpu")[1]
