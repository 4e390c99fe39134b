"""Recipes: published numbers by default, a set of others by name, and flags that win over both."""

import dataclasses
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.recipes import INGREDIENTS, RECIPES, given_ingredients, resolve
from mambahome_jax.usage import help_text


def _resolve(**flags):
    return resolve(TrainConfig(Path("data"), **flags))


def test_every_ingredient_has_a_flag():
    assert {*INGREDIENTS} < {field.name for field in dataclasses.fields(TrainConfig)} and len(INGREDIENTS) == 26
    assert {"optimizer", "lr", "ema_decay", "mirror", "affine_scale"} < {*INGREDIENTS}
    assert all(recipe.ingredients().keys() == INGREDIENTS.keys() for recipe in RECIPES.values())


def test_the_default_is_the_published_recipe():
    found = _resolve()
    optimizer = found.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.eps, optimizer.weight_decay) == ("AdamW", 1e-4, 1e-4, 1e-4)
    assert found.augment
    assert (found.augmentation.zoom_probability, found.augmentation.rotate90_probability) == (0.3, 0.1)
    off = ("dropout", "warmup_steps", "clip_norm", "ema_decay", "affine_probability")
    assert all(found.ingredients()[name] == 0 for name in off) and found.mirror == ("none",)
    assert optimizer.momentum == 0
    assert _resolve(optimizer="Adam").optimizer.eps == 1e-8


def test_the_strong_recipe_and_flags_that_win_over_it():
    found = _resolve(recipe="strong")
    assert (found.optimizer.lr, found.optimizer.eps, found.optimizer.weight_decay) == (3e-4, 1e-8, 0.05)
    assert found.ema_decay == 0.999 and found.dropout == 0.1 and found.mirror == ("LR",)
    assert found.augmentation.affine_probability == 0.7 and found.augmentation.elastic_probability == 0.5
    given = _resolve(recipe="strong", lr=1e-3, ema_decay=0.0, mirror=("none",), class_balanced=False)
    assert (given.optimizer.lr, given.ema_decay, given.mirror, given.class_balanced) == (1e-3, 0.0, ("none",), False)
    assert given.optimizer.eps == RECIPES["strong"].optimizer.eps
    small = _resolve(model="MambaHoME_small", recipe="strong")
    assert small.optimizer.lr == 1e-3 and small.deep_supervision


def test_the_recipe_of_nnunet_is_one_for_all_networks():
    for model in ("MambaHoME_tiny", "ResEncUNet_L"):
        found = _resolve(model=model, recipe="nnunet")
        optimizer = found.optimizer
        assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.01, 0.99, 3e-5)
        assert (optimizer.clip_norm, optimizer.scheduler, found.ema_decay) == (12, "polynomial", 0)
        assert found.deep_supervision and not found.dice_background and not found.batch_dice
        assert found.mirror == ("LR", "AP", "IS")
    assert _resolve(recipe="nnunet", batch_dice=True).batch_dice
    assert _resolve(recipe="nnunet", optimizer="AdamW", lr=1e-3, scheduler="CALR").optimizer.eps == 1e-8


def test_a_rotation_that_is_given_is_that_of_thick_slices_too():
    assert _resolve(recipe="strong").augmentation.plane_rotation == 180
    assert _resolve(recipe="strong", affine_rotation=10.0).augmentation.plane_rotation == 0
    assert _resolve(recipe="strong", affine_rotation=10.0, plane_rotation=90.0).augmentation.plane_rotation == 90


def test_flags_on_the_command_line():
    arguments = "--data_train a --recipe strong --mirror LR AP --deep_supervision --class_balanced False --ema_decay 0"
    config = cli.parse("train", arguments.split())
    assert config.mirror == ("LR", "AP") and config.deep_supervision is True and config.class_balanced is False
    assert config.ema_decay == 0 and config.lr is None and config.data_train == Path("a")
    assert given_ingredients(config).keys() == {"mirror", "deep_supervision", "class_balanced", "ema_decay"}


def test_the_help_tells_each_recipe_s_value():
    said = " ".join(help_text(TrainConfig, "mambahome train", brief=False).split())
    assert "(published: 0.3; others: 0)" in said
    assert (
        "(published: 0.0001, MambaHoME_small 0.0003, MambaHoME_tiny 0.002; strong: 0.0003, " in said
        and "; nnunet: 0.01)" in said
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ema_decay": 1.0}, "--ema_decay 1;"),
        ({"dropout": 1.0}, "--dropout 1; expected 0 or more"),
        ({"dropout": -0.1}, "--dropout -0.1; expected 0 or more"),
        ({"gamma_probability": 1.5}, "--gamma_probability 1.5; expected 0 to 1"),
        ({"clip_norm": -1.0}, "--clip_norm -1;"),
        ({"affine_scale": (1.2, 0.8)}, "--affine_scale 1.2 0.8"),
        ({"elastic_std": 4.0}, "--elastic_std 4; expected 0 to 3"),
        ({"eps": 0.0}, "--eps 0;"),
    ],
)
def test_values_that_cannot_work_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        _resolve(**flags)
