"""dnd_hf.files: whole or not there."""

import pytest

from dnd_hf.files import new_folder


def test_the_output_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "out") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list((tmp_path / "a").iterdir())
    (tmp_path / "a" / "out").mkdir()
    with new_folder(tmp_path / "a" / "out") as folder:
        (folder / "whole").touch()
        assert not list((tmp_path / "a" / "out").iterdir())
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["out", "whole"]
    with pytest.raises(FileExistsError, match="must be new or empty"), new_folder(tmp_path / "a" / "out"):
        raise AssertionError("the block must not begin")
