"""dataset.json and CSV tables as anybody may have written them: one line that names the file, no traceback."""

import json

import pytest

from mambahome_jax.datasets.prepared import Prepared, PreparedCase, read_prepared, write_prepared
from mambahome_jax.datasets.registry import load_dataset
from mambahome_jax.errors import DatasetError
from mambahome_jax.support.files import read_json


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply(tmp_path, text):
    path = tmp_path / "dataset.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"dataset\.json: not valid JSON \(nested too deeply\)"):
        read_json(path)


@pytest.mark.parametrize("cell", ["a" * 200_000, "x" * 5000 + ".nii.gz", "x\\" + "y" * 5000 + ".nii.gz"])
@pytest.mark.parametrize("head", ["", "image\n", 'image\n"'])
def test_csv_tables_with_endless_fields(tmp_path, head, cell):
    path = tmp_path / "cases.csv"
    path.write_text(head + cell)
    with pytest.raises(DatasetError, match=r"cases\.csv") as caught:
        load_dataset(path)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("key", "value"), [("spacing", [10**400, 1, 1]), ("shape", [float("inf"), 1, 1]), ("id", {"a": "b"}), ("id", None)]
)
def test_prepared_cases_with_values_of_another_kind(tmp_path, key, value):
    case = PreparedCase("a", "images/a.nii.gz", None, None, "mr", (1, 1, 1), (1.0, 1.0, 1.0), "images/a.nii.gz")
    write_prepared(Prepared(tmp_path, "x", (1.0, 1.0, 1.0), "RAS", ("image",), {1: "liver"}, (case,)))
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_text())
    content["cases"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"dataset\.json: damaged"):
        read_prepared(tmp_path)


def test_messages_do_not_repeat_a_file_at_any_length():
    assert len(str(DatasetError("9" * 100_000, file="dataset.json"))) < 3000
