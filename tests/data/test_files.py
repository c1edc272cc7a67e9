"""Small files are replaced whole or not at all."""

from pathlib import Path

import pytest

from data.files import write


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    for text in ("längst\n", "new\n"):
        write(path, text)
        assert path.read_bytes() == text.encode() and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "note.json"
    (folder / "within").mkdir(parents=True)
    with pytest.raises(OSError):
        write(folder, "new\n")
    assert list(tmp_path.iterdir()) == [folder] and (folder / "within").is_dir()
    with pytest.raises(OSError):
        write(tmp_path / "absent" / "note.json", "new\n")
