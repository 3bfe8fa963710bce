"""A file is whole or absent, whatever ends its writer."""

import errno
import os

import pytest

from lm_jax import disk


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "record.json"
    disk.replace(path, ["[1, ", "2]"])

    def chunks():
        yield "[3, "
        raise OSError(errno.ENOSPC, "no room")

    with pytest.raises(OSError, match="no room") as error:
        disk.replace(path, chunks())
    assert error.value.filename == str(path)
    assert disk.read_json(path) == [1, 2] and os.listdir(tmp_path) == ["record.json"]


def test_no_file_is_none_and_a_damaged_one_an_error(tmp_path):
    assert disk.read_json(tmp_path / "none.json") is None
    for damaged in (b'{"a": ', b"\xff\xff", b""):
        (tmp_path / "bad.json").write_bytes(damaged)
        with pytest.raises(ValueError):
            disk.read_json(tmp_path / "bad.json")


def test_a_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    disk.sync(tmp_path / "abc")
    disk.sync(tmp_path)
    assert disk.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-4's example
