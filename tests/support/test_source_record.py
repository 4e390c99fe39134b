"""Files are what they were by their content; the file system's word alone is trusted where it cannot be set back."""

import os
from pathlib import Path

import pytest

from mambahome_jax.errors import DatasetError
from mambahome_jax.support import files
from mambahome_jax.support.files import record_of, renewed


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"one")
    return path


def replace_unseen(path: Path, content: bytes) -> None:
    """As copying with times does: same name, size and time of modification."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_a_file_that_nobody_touched_is_not_read(file, monkeypatch):
    record = record_of([file])
    monkeypatch.setattr(files, "_content", lambda files: pytest.fail("read"))
    assert renewed(record, [file]) == record


def test_another_content_of_the_same_size_and_time_is_a_change(file):
    record = record_of([file])
    replace_unseen(file, b"two")
    assert renewed(record, [file]) is None


def test_the_same_content_elsewhere_or_written_again_is_none(file, tmp_path):
    record = record_of([file])
    other = tmp_path / "copy" / "renamed.nii.gz"
    other.parent.mkdir()
    other.write_bytes(file.read_bytes())
    moved = renewed(record, [other])
    assert moved is not None and moved["content"] == record["content"] and moved["stat"] != record["stat"]
    os.utime(file, (1, 1))
    assert renewed(record, [file]) is not None


def test_one_file_more_or_less_is_a_change(file, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    record = record_of([file, tmp_path / "empty"])
    assert renewed(record, [file]) is None and renewed(record, [tmp_path / "empty", file]) is None


def test_what_is_no_record_is_a_change_and_a_missing_file_is_named(file):
    for record in (None, [], {}, {"stat": "x"}, {"content": 1}, "text"):
        assert renewed(record, [file]) is None
    for read in (lambda path: record_of([path]), lambda path: renewed({"stat": "", "content": ""}, [path])):
        with pytest.raises(DatasetError, match=r"missing.nii: cannot be read: No such file"):
            read(file.with_name("missing.nii"))
