"""Model folders of nnU-Net: which networks and scans their files name, what is refused, and the way back."""

import json
import shutil

import numpy as np
import pytest

import mambahome_jax as mh
from mambahome_jax.commands import convert
from mambahome_jax.config import DataProperties, PlainUNetConfig
from mambahome_jax.errors import CheckpointError, ConfigError, OutputError
from mambahome_jax.flags import ConvertConfig
from mambahome_jax.imaging.nnunet import NnunetPreparation
from mambahome_jax.imaging.normalisation import ChannelScheme, PerChannel
from mambahome_jax.weights.model_path import networks_at
from mambahome_jax.weights.nnunet import nnunet_checkpoints
from mambahome_jax.weights.pth import read_pth, write_pth
from mambahome_jax.weights.weights import read_weights
from tests.nnunet_models import copied, miniature, model_folder

CONFIG = PlainUNetConfig(
    in_chans=2,
    out_chans=3,
    depths=(2, 2, 2),
    feat_size=(4, 8, 16),
    strides=((1, 2, 2), (2, 2, 2)),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    decoder_depths=(2, 2),
)
CT = ChannelScheme("CTNormalization", False, 30, 237, 107.56159210205078, 45.10835266113281)
PREPARATION = NnunetPreparation(
    (0, 2, 1), PerChannel((CT, ChannelScheme("ZScoreNormalization", masked=True))), mirror_axes=(0, 1, 2)
)
DATA = DataProperties(
    spacing=(4, 1, 1),
    modality="mr",
    labels=((1, "organ"), (2, "tumour")),
    channels=("CT", "MRI"),
    patch_size=(8, 16, 16),
    resampling="cubic",
    nnunet=PREPARATION,
)


def fold_of(path):
    return path / "fold_0" / "checkpoint_final.pth"


@pytest.mark.parametrize("old", [False, True], ids=["plans of today", "plans of early releases"])
def test_network_and_scans_come_from_the_plans(tmp_path, old):
    folder = copied(tmp_path)
    if old:
        shutil.copy(miniature("aniso") / "plans_old_format.json", folder / "plans.json")
    weights = read_weights(folder / "fold_0")
    assert weights.config == CONFIG
    assert weights.data == DATA
    stored = read_pth(fold_of(folder))["network_weights"]["decoder.encoder.stages.1.0.convs.0.all_modules.0.weight"]
    np.testing.assert_array_equal(weights.params["encoder.stages.1.0.conv.kernel"], stored.transpose(2, 3, 4, 1, 0))


def test_a_checkpoint_alone_has_the_plans_in_it(tmp_path):
    shutil.copy(fold_of(model_folder(miniature("aniso"))), tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth").data == DATA


def test_folds_are_those_with_a_number_else_all(tmp_path):
    folder = copied(tmp_path)
    assert networks_at([folder]) == ([fold_of(folder), folder / "fold_1" / "checkpoint_final.pth"], [])
    assert nnunet_checkpoints(folder / "fold_1") == [folder / "fold_1" / "checkpoint_final.pth"]
    with pytest.raises(CheckpointError, match=r"2 folds; expected one, such as .*fold_0"):
        read_weights(folder)
    (folder / "fold_0").rename(folder / "fold_all")
    assert [path.parent.name for path in nnunet_checkpoints(folder)] == ["fold_1"]
    shutil.rmtree(folder / "fold_1")
    assert [path.parent.name for path in nnunet_checkpoints(folder)] == ["fold_all"]
    shutil.rmtree(folder / "fold_all")
    with pytest.raises(CheckpointError, match=r"no fold_\*/checkpoint_final.pth"):
        nnunet_checkpoints(folder)
    with pytest.raises(CheckpointError, match="several models; expected one of nnUNetTrainer__nnUNetPlans__3d_full"):
        nnunet_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=f"several models; expected one of .*{tmp_path.name}/nnUNetTrainer__nnUN"):
        nnunet_checkpoints(tmp_path.parent)


def test_folds_without_their_last_checkpoint_are_named(tmp_path):
    folder = copied(tmp_path)
    (folder / "fold_0").rename(folder / "fold_00")
    (folder / "fold_10").mkdir()
    (folder / "fold_1").rename(folder / "fold_9")
    (folder / "fold_10" / "checkpoint_best.pth").touch()
    paths, notes = networks_at([folder])
    assert [path.parent.name for path in paths] == ["fold_00", "fold_9"]
    assert notes == [f"{folder}: fold_10 without checkpoint_final.pth; the other folds segment alone"]


def test_folds_have_no_published_names_together():
    with pytest.raises(ConfigError, match=r"a model of 2 folds; expected one network, such as model.networks\[0\]"):
        mh.export_official(mh.load_model(model_folder(miniature("aniso"))))


def test_regions_and_totalsegmentator(tmp_path):
    """Overlapping regions have a value each, and scans of TotalSegmentator were turned to RAS before."""

    def regions(dataset):
        dataset["labels"] = {"background": 0, "whole": [1, "2", 3], "core": [3, 2], "rim": "3", "ignore": 4}
        dataset["regions_class_order"] = [1, 3, 2]

    folder = copied(tmp_path, dataset=regions, plans=lambda plans: plans.update(dataset_name="Dataset291_TotalSegm"))
    data = read_weights(folder / "fold_0").data
    assert data.labels == ((1, "whole"), (3, "core"), (2, "rim"))
    assert data.nnunet.regions == (1, 3, 2)
    assert data.nnunet.orientation is None
    folder = copied(tmp_path / "b", plans=lambda plans: plans.update(dataset_name="Dataset291_TotalSegmentator_part1"))
    assert read_weights(folder / "fold_0").data.nnunet.orientation == "RAS"


def full(change):
    return lambda plans: change(plans["configurations"]["3d_fullres"])


def architecture(**changes):
    return full(lambda full: full["architecture"]["arch_kwargs"].update(changes))


@pytest.mark.parametrize(
    ("plans", "refused"),
    [
        (full(lambda full: full.update(previous_stage="3d_lowres")), "3d_fullres: a cascade.*supported are 3d_fullres"),
        (full(lambda full: full.update(patch_size=[16, 16])), "works on slices; supported are 3d_fullres"),
        (full(lambda full: full.update(preprocessor_name="Own")), "preprocessor_name is Own; expected DefaultPre"),
        (full(lambda full: full.update(resampling_fn_data="torch_fast")), "resampling_fn_data is torch_fast; expected"),
        (
            full(lambda f: f["resampling_fn_probabilities_kwargs"].update(order=3)),
            "probabilities_kwargs is .*'order': 3",
        ),
        (full(lambda full: full.update(normalization_schemes=["A", "B"])), "scheme is 'A'; expected one of CTNorm"),
        (full(lambda full: full["architecture"].update(network_class_name="a.Primus")), "network_class_name is Primus"),
        (architecture(norm_op="torch.nn.BatchNorm3d"), "norm_op of the network is torch.nn.BatchNorm3d; expected Inst"),
        (architecture(attention=True), "attention of the network is True; expected none of that name"),
        (
            architecture(features_per_stage=[4, 8, 32]),
            r"is \(16, 8, 3, 3, 3\), expected \(32, 8, 3, 3, 3\)",
        ),
        (
            lambda plans: plans.update(image_reader_writer="Tiff3DIO"),
            "image_reader_writer is Tiff3DIO; expected Simple",
        ),
        (full(lambda full: full.update(spacing=[0, 1, 1])), r"spacing is \[0, 1, 1\]; expected mm above 0"),
        (lambda plans: plans.pop("transpose_forward"), "no entry 'transpose_forward' in plans.json or dataset.json"),
    ],
)
def test_what_would_compute_something_else_is_refused(tmp_path, plans, refused):
    folder = copied(tmp_path, plans=plans)
    with pytest.raises(CheckpointError, match=refused) as error:
        read_weights(folder / "fold_0")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"plans": lambda plans: plans.update(transpose_forward=None)}, "transpose_forward is None; expected an order"),
        (
            {"plans": lambda plans: plans.update(image_reader_writer=[])},
            r"image_reader_writer is \[\]; expected a name",
        ),
        ({"plans": lambda plans: plans.update(configurations=3)}, "configurations is 3; expected an object"),
        ({"plans": full(lambda full: full.update(patch_size=16))}, "patch_size is 16; expected integers above 0"),
        ({"plans": full(lambda full: full.update(spacing=["a"]))}, r"spacing is \['a'\]; expected mm above 0"),
        (
            {"plans": full(lambda full: full.update(use_mask_for_norm=[]))},
            "use_mask_for_norm has 0 entries; expected 2",
        ),
        ({"plans": architecture(strides=[])}, r"the strides are \[\]; expected 1 1 1 as the first"),
        (
            {"plans": lambda plans: plans["foreground_intensity_properties_per_channel"]["0"].update(mean="x")},
            "mean of channel 0 is 'x'; expected a number",
        ),
        ({"dataset": lambda dataset: dataset.update(channel_names="CT")}, "channel_names is 'CT'; expected an object"),
        ({"dataset": lambda dataset: dataset.update(labels=None)}, "labels is None; expected an object"),
        (
            {"dataset": lambda dataset: dataset["labels"].update(organ=[])},
            r"label organ is \[\]; expected a label value",
        ),
    ],
)
def test_a_damaged_entry_is_told_by_its_name(tmp_path, changes, refused):
    folder = copied(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"configuration 3d_fullres: {refused}"):
        read_weights(folder / "fold_0")


def test_a_trainer_that_changed_the_network_is_named(tmp_path):
    """As one of batch norm does, whose tensors are the same and more."""
    folder = copied(tmp_path)
    content = read_pth(fold_of(folder))
    tensors = {**content["network_weights"], "encoder.stages.0.0.convs.0.norm.running_mean": np.zeros(4, np.float32)}
    others = {"init_args": {"configuration": "3d_fullres"}, "trainer_name": "nnUNetTrainerBN"}
    write_pth(fold_of(folder), tensors, others, "network_weights")
    with pytest.raises(
        CheckpointError, match=r"unknown \(1\): .*running_mean. Has the trainer, nnUNetTrainerBN, changed"
    ):
        read_weights(folder / "fold_0")


def test_labels_that_outputs_cannot_be_are_refused(tmp_path):
    folder = copied(tmp_path, dataset=lambda dataset: dataset["labels"].update(tumour=5))
    with pytest.raises(CheckpointError, match=r"labels are \[0, 1, 5\]; expected 0, 1, 2"):
        read_weights(folder / "fold_0")


def test_a_configuration_inherits(tmp_path):
    def inherit(plans):
        plans["configurations"]["3d_lowres"] = plans["configurations"].pop("3d_fullres")
        plans["configurations"]["3d_fullres"] = {"inherits_from": "3d_lowres", "spacing": [5, 1, 1]}

    data = read_weights(copied(tmp_path, plans=inherit) / "fold_0").data
    assert data.spacing == (5, 1, 1) and data.patch_size == (8, 16, 16)


@pytest.mark.parametrize("name", ["ours", "checkpoint_final.pth", "w.npz"])
def test_a_fold_is_converted_to_ours_and_back(tmp_path, name):
    source = model_folder(miniature("aniso")) / "fold_1"
    assert convert.run(ConvertConfig(source, tmp_path / name)) == 0
    assert convert.run(ConvertConfig(tmp_path / name, tmp_path / "back" / "checkpoint_final.pth")) == 0
    before, after = read_pth(source / "checkpoint_final.pth"), read_pth(tmp_path / "back" / "checkpoint_final.pth")
    assert after.keys() >= {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    assert after["trainer_name"] == "nnUNetTrainer" and after["inference_allowed_mirroring_axes"] == (0, 1, 2)
    assert after["init_args"]["configuration"] == "3d_fullres"
    assert after["network_weights"].keys() == before["network_weights"].keys()
    for key, array in before["network_weights"].items():
        np.testing.assert_array_equal(after["network_weights"][key], array)
    assert read_weights(tmp_path / "back" / "checkpoint_final.pth").data == DATA


def test_several_folds_become_a_run_of_them(tmp_path, capsys):
    source, out = model_folder(miniature("aniso")), tmp_path / "out"
    assert convert.run(ConvertConfig(source, out)) == 0
    assert "2 networks, each of" in capsys.readouterr().out
    paths, notes = networks_at([out])
    assert [path.name for path in paths] == ["fold_0", "fold_1"] and notes == []
    for path in paths:
        ours, theirs = read_weights(path), read_weights(source / path.name)
        assert ours.data == theirs.data and ours.config == theirs.config
        for name, array in theirs.params.items():
            np.testing.assert_array_equal(ours.params[name], array)
    with pytest.raises(OutputError, match="exists already"):
        convert.run(ConvertConfig(source, out))
    assert convert.run(ConvertConfig(source, out, overwrite=True)) == 0
    with pytest.raises(ConfigError, match="2 folds make a folder"):
        convert.run(ConvertConfig(source, tmp_path / "a.npz"))
    assert json.loads((out / "fold_0/checkpoints/best/config.json").read_text())["data"]["nnunet"]["axes"] == [0, 2, 1]
