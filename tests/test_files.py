"""Files that are written whole or not at all: what the errors say."""

import errno
import io
import sys

import pytest

from temporal_agg.files import print_any_name, replace_file


def test_an_error_names_the_file_and_not_the_one_that_is_being_made(tmp_path):
    target = tmp_path / "nowhere" / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.txt cannot be written: No such file") as error:
        replace_file(target, lambda temporary: temporary.write_text("x"))
    assert error.value.errno == errno.ENOENT

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(OSError, match=r"/a\.txt cannot be written: No space left") as full:
        replace_file(tmp_path / "a.txt", fail)
    assert ".tmp" not in str(full.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"


def test_an_error_of_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        replace_file(tmp_path / "a.txt", lambda temporary: (tmp_path / "source.txt").read_bytes())
    assert error.value.filename == str(tmp_path / "source.txt")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_name_can_be_printed(monkeypatch, encoding):
    screen = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", screen)
    print_any_name()
    print("\u884c\u4eba", "caf\udce9", flush=True)
    said = screen.buffer.getvalue().decode(encoding)
    assert said.endswith("caf\\udce9\n")
    assert said.startswith("\u884c\u4eba" if encoding == "utf-8" else "\\u884c\\u4eba")
    monkeypatch.setattr(sys, "stdout", None)  # no console
    print_any_name()
