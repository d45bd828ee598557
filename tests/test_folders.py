"""Whether an output folder can be written is known before it is made."""

import os

import pytest

from loglinear.folders import check_output_folder


def test_folders_that_are_there_or_can_be_made_are_taken_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "deep", "new", "."):
        check_output_folder(folder)
    (tmp_path / "link").symlink_to(tmp_path)
    check_output_folder("link/new")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_files_are_refused(tmp_path):
    file, dangling = tmp_path / "file", tmp_path / "dangling"
    file.write_text("precious")
    dangling.symlink_to(tmp_path / "absent")
    for place in (file, dangling):
        with pytest.raises(FileExistsError, match=f"^output: got {place}, which is not a folder; wanted a folder"):
            check_output_folder(place)
        with pytest.raises(FileExistsError, match=f"^output: got {place}/a/b, but {place} is not a folder; wanted"):
            check_output_folder(place / "a" / "b")


def test_folders_that_may_not_be_written_in_are_refused(tmp_path, monkeypatch):
    """The superuser may write everywhere, so the answer of the system is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    check_output_folder(tmp_path.parent / "new")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(PermissionError, match=f"^output: got {folder}, but {tmp_path} may not be written in"):
            check_output_folder(folder)
