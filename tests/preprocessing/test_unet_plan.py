"""Patch, grids and batch of the U-Nets, against 3D configurations that the planner of nnunetv2 2.8.1 made."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mambahome_jax.config import MODEL_SIZES, ResEncUNetConfig
from mambahome_jax.errors import ConfigError, DatasetError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.preprocessing.fingerprint import Fingerprint
from mambahome_jax.preprocessing.grids import TARGETS, choose_grids, grids_for, plan_unet
from mambahome_jax.preprocessing.plan import Machine, Setting, follow_plan, make_plan, read_plan, write_plan
from mambahome_jax.preprocessing.step_memory import parameters, step_gib
from tests.conftest import golden_path

PLANNERS = {"plain": "PlainUNet", "plain_24gb": "PlainUNet"} | {
    f"resenc_{size}": f"ResEncUNet_{size.upper()}" for size in ("m", "l", "xl")
}


def reversed_axes(rows):
    return tuple(tuple(row[::-1]) for row in rows)


def test_every_3d_configuration_of_the_golden():
    """Those of low resolution too, at their spacing and shape; axes of nnU-Net are ours in reverse."""
    count = 0
    for case in json.loads(gzip.decompress(golden_path("baselines/planner_cases.json.gz").read_bytes())):
        for planner, plans in case["plans"].items():
            model = PLANNERS[planner]
            target = dataclasses.replace(TARGETS[model], outputs=1_680_000_000) if planner == "plain_24gb" else None
            for name, golden in plans["configurations"].items():
                if name == "2d":
                    continue
                spacing, shape = golden["spacing"][::-1], golden["median_image_size_in_voxels"][::-1]
                plan = plan_unet(model, spacing, shape, case["numTraining"], len(case["labels"]), target=target)
                network = MODEL_SIZES[model].model.replace(in_chans=len(case["channel_names"]))
                network = network.with_grids(*plan.grids[1:])
                what = case["name"], planner, name
                assert plan.grids.patch_size == tuple(golden["patch_size"][::-1]), what
                assert (plan.batch_size, plan.outputs) == (golden["batch_size"], golden["estimate"]), what
                assert ((1, 1, 1), *plan.grids.strides) == reversed_axes(golden["strides"]), what
                assert plan.grids.kernel_sizes == reversed_axes(golden["kernel_sizes"]), what
                assert network.feat_size == tuple(golden["features_per_stage"]), what
                assert network.depths == tuple(golden["blocks_encoder"]), what
                assert network.decoder_depths == tuple(golden["blocks_decoder"]), what
                assert abs(parameters(network) / golden["parameters"] - 1) < 0.004, what
                count += 1
    assert count > 100


def fingerprint(spacing, shape, cases, **fields):
    spacings, shapes = (np.tile(np.array(row, float), (cases, 1)) for row in (spacing, shape))
    return Fingerprint(spacings, shapes, **fields)


GPU = Machine(80.0)
AMOS = fingerprint((0.7, 0.7, 5), (512, 512, 100), 200, classes=16)


def plan_for(model, numbers=AMOS, machine=GPU, **given):
    settings = {"model": Setting(model, "given")} | {name: Setting(value, "given") for name, value in given.items()}
    return make_plan(numbers, machine, settings)


@pytest.mark.parametrize(
    ("model", "patch", "strides"),
    [
        ("PlainUNet", (192, 224, 40), "221 221 222 222 222"),
        ("ResEncUNet_M", (192, 192, 40), "221 221 222 222 222"),
        ("ResEncUNet", (256, 320, 56), "221 221 222 222 222 221"),
        ("ResEncUNet_L", (256, 320, 56), "221 221 222 222 222 221"),
        ("ResEncUNet_XL", (320, 384, 64), "221 221 222 222 222 222"),
    ],
)
def test_a_plan_is_that_of_nnunet_on_any_machine(model, patch, strides):
    """Abdominal CT of thick slices: which of the two equal axes is the shorter one is nnU-Net's choice too."""
    plan = plan_for(model)
    assert (plan.patch_size.value, plan.batch_size.value) == (patch, 2)
    assert " ".join("".join(map(str, stride)) for stride in plan.strides.value) == strides
    assert len(plan.kernel_sizes.value) == len(plan.strides.value) + 1
    assert f"as nnU-Net's planner for {model}" in plan.patch_size.reason
    for name in ("patch_size", "strides", "kernel_sizes"):
        assert getattr(plan_for(model, machine=Machine()), name) == getattr(plan, name)
    assert make_plan(AMOS, GPU, plan.settings()) == plan


def test_a_single_large_slice_is_cut_within_its_plane():
    found = plan_unet("ResEncUNet_M", (0.15, 0.15, 10), (2500, 2500, 1), cases=5, classes=3)
    assert found.grids.patch_size[2] == 1 and min(found.grids.patch_size[:2]) > 500
    assert found.outputs <= TARGETS["ResEncUNet_M"].outputs


def test_the_batch_is_bounded_by_the_dataset():
    small = fingerprint((1, 1, 1), (35, 50, 36), 10, classes=3)
    assert plan_for("PlainUNet", small).batch_size.value == 2
    assert "at most 5% of the dataset's voxels" in plan_for("PlainUNet", small).batch_size.reason
    assert plan_for("ResEncUNet_L", small).batch_size.value == 7
    assert plan_for("ResEncUNet_L", small, Machine(8.0)).batch_size.value == 7
    assert plan_for("ResEncUNet_L", small, Machine()).batch_size.value == 2


def test_a_given_patch_has_its_own_grids_and_batch():
    plan = plan_for("ResEncUNet_L", patch_size=(64, 64, 16))
    assert plan.patch_size == Setting((64, 64, 16), "given")
    assert plan.strides.value == grids_for((0.7, 0.7, 5), (64, 64, 16), unet=True).strides
    assert plan.batch_size.value > 50


def test_training_takes_the_planned_grids_and_those_of_another_patch():
    plan = plan_for("ResEncUNet_L")
    flags = follow_plan(TrainConfig(Path("ready")), plan.settings(), str(GPU))
    assert (flags.model, flags.patch_size, flags.batch_size) == ("ResEncUNet_L", (256, 320, 56), 2)
    planned = {name: setting.value for name, setting in plan.settings().items()}
    grids = choose_grids(flags, [(512, 512, 100)], (0.7, 0.7, 5), planned)
    assert grids == (plan.patch_size.value, plan.strides.value, plan.kernel_sizes.value)
    # Without a plan: the patch of the network, or a given one.
    alone = TrainConfig(Path("ready"), model="ResEncUNet")
    assert choose_grids(alone, [(512, 512, 20)], (0.7, 0.7, 5)).patch_size == (128, 128, 20)
    other = choose_grids(dataclasses.replace(alone, patch_size=(64, 32, 8)), [(512, 512, 20)], (0.7, 0.7, 5))
    assert other == grids_for((0.7, 0.7, 5), (64, 32, 8), unet=True)
    ResEncUNetConfig().with_grids(*other[1:]).check_size(other.patch_size)
    with pytest.raises(ConfigError, match=r"--patch_size 100 64 16; expected multiples of .* such as"):
        choose_grids(dataclasses.replace(alone, patch_size=(100, 64, 16)), [(512, 512, 20)], (1, 1, 1))


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 4, 4), (7, 9, 1), (8, 8, 8), (16, 3, 3)])
def test_tiny_patches_have_two_stages_at_least(size):
    grids = choose_grids(TrainConfig(Path("data"), model="PlainUNet"), [size], (1, 1, 1))
    network = MODEL_SIZES["PlainUNet"].model.with_grids(grids.strides, grids.kernel_sizes)
    network.check_size(grids.patch_size)
    assert len(network.feat_size) >= 2


@pytest.mark.parametrize(
    ("model", "mixer", "spacing", "patch", "batch", "peak"),
    [
        ("ResEncUNet_L", "scan", (1, 1, 1), (96, 96, 96), 4, 3.58),
        ("ResEncUNet_L", "scan", (1.5, 1.5, 10), (224, 256, 10), 7, 6.27),
        ("SegMamba", "scan", (1, 1, 1), (96, 96, 96), 4, 8.66),
        ("SegMamba", "scan", (1.5, 1.5, 10), (224, 256, 10), 7, 15.54),
        ("MambaHoME_small", "scan", (1.5, 1.5, 10), (224, 256, 10), 7, 4.95),
        ("MambaHoME_small", "none", (1.5, 1.5, 10), (224, 256, 10), 7, 4.06),
    ],
)
def test_the_estimated_memory_of_a_step_is_near_what_was_measured(model, mixer, spacing, patch, batch, peak):
    """GiB of the steps of docs/experiments/duels.md on an H200."""
    grids = grids_for(spacing, patch, unet=model.startswith("ResEnc"))
    network = MODEL_SIZES[model].model.with_grids(grids.strides, grids.kernel_sizes)
    network = network.replace(mixer=mixer) if mixer != "scan" else network
    assert step_gib(network, patch, batch) == pytest.approx(peak, rel=0.04)


def test_a_plan_with_too_few_strides_is_refused(tmp_path):
    write_plan(tmp_path / "plan.json", plan_for("ResEncUNet_L"), GPU, AMOS)
    assert read_plan(tmp_path / "plan.json").settings == plan_for("ResEncUNet_L").settings()
    content = json.loads((tmp_path / "plan.json").read_text())
    content["strides"]["value"].pop()
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"plan\.json: strides has 5 entries; expected 6 for 7 stages"):
        read_plan(tmp_path / "plan.json")
