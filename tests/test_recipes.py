"""Recipes: published numbers by default, a set of others by name, and flags that win over both."""

import dataclasses
from pathlib import Path

import pytest

from mambahome_jax import cli
from mambahome_jax.config import MODEL_SIZES
from mambahome_jax.errors import ConfigError
from mambahome_jax.flags import TrainConfig
from mambahome_jax.recipes import RECIPES, Ingredients, RecipeFlags, resolve


def _resolve(**flags):
    return resolve(TrainConfig(Path("data"), **flags), size_lr=1e-4, size_eps=1e-4, strong_lr=3e-4)


def test_every_ingredient_has_a_flag_and_every_flag_is_an_ingredient():
    names = {field.name for field in dataclasses.fields(Ingredients)}
    assert names | {"recipe"} == {field.name for field in dataclasses.fields(RecipeFlags)}


def test_the_default_is_the_published_recipe():
    found = _resolve()
    assert (found.optimizer, found.lr, found.eps, found.weight_decay) == ("AdamW", 1e-4, 1e-4, 1e-4)
    assert found.augment and (found.zoom_probability, found.rotate90_probability) == (0.3, 0.1)
    off = ("dropout", "momentum", "warmup_steps", "clip_norm", "ema_decay", "label_smoothing", "affine_probability")
    assert all(getattr(found, name) == 0 for name in off) and found.mirror == ("none",)
    assert _resolve(optimizer="Adam").eps == 1e-8


def test_the_strong_recipe_and_flags_that_win_over_it():
    found = _resolve(recipe="strong")
    assert (found.lr, found.eps, found.weight_decay) == (3e-4, 1e-8, 0.05)
    assert found.ema_decay == 0.999 and found.dropout == 0.1 and found.mirror == ("LR",)
    assert found.affine_probability == 0.7 and found.elastic_probability == 0.5
    given = _resolve(recipe="strong", lr=1e-3, ema_decay=0.0, mirror=("none",), class_balanced=False)
    assert (given.lr, given.ema_decay, given.mirror, given.class_balanced) == (1e-3, 0.0, ("none",), False)
    assert given.eps == RECIPES["strong"].eps
    size = MODEL_SIZES["MambaHoME_small"]
    small = resolve(TrainConfig(Path("data"), recipe="strong"), size.lr, size.eps, size.strong_lr)
    assert small.lr == 1e-3 and small.deep_supervision


def test_flags_on_the_command_line():
    arguments = "--data_train a --recipe strong --mirror LR AP --deep_supervision --class_balanced False --ema_decay 0"
    config = cli.parse("train", arguments.split(), "mambahome")
    assert config.mirror == ("LR", "AP") and config.deep_supervision is True and config.class_balanced is False
    assert config.ema_decay == 0 and config.lr is None and config.data_train == Path("a")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ema_decay": 1.0}, "--ema_decay 1.0"),
        ({"dropout": 1.0}, "--dropout 1.0; expected 0 or more"),
        ({"dropout": -0.1}, "--dropout -0.1; expected 0 or more"),
        ({"gamma_probability": 1.5}, "--gamma_probability 1.5; expected 0 to 1"),
        ({"momentum": 1.0}, "--momentum 1.0"),
        ({"clip_norm": -1.0}, "--clip_norm -1.0"),
        ({"affine_scale": (1.2, 0.8)}, "--affine_scale 1.2 0.8"),
        ({"elastic_std": 4.0}, "--elastic_std 4.0; expected 0 to 3"),
        ({"eps": 0.0}, "--eps 0.0"),
    ],
)
def test_values_that_cannot_work_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        _resolve(**flags)
