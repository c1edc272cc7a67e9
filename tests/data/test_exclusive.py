import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.exclusive import exclusive

ROOT = Path(__file__).resolve().parents[2]
MAKER = """
import sys, time
from pathlib import Path
from data.exclusive import exclusive
target = Path(sys.argv[1])
with exclusive(target, lambda folder: (folder / "done").is_file()) as folder:
    if folder is not None:
        (folder / "part").write_text("half")
        (target.parent / f"started-{sys.argv[2]}").touch()
        time.sleep(float(sys.argv[3]))
        (folder / "done").write_text(sys.argv[2])
"""


def done(folder: Path) -> bool:
    return (folder / "done").is_file()


def start(target: Path, name: str, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", MAKER, target, name, str(seconds)], cwd=ROOT)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with pytest.raises(RuntimeError), exclusive(target, done) as folder:
        assert folder is not None
        (folder / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with exclusive(target, done) as folder:
        assert folder is not None
        (folder / "done").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["done"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    with exclusive(target, done) as folder:
        assert folder is None


def test_a_killed_process_leaves_nothing_that_looks_complete_and_the_next_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "target"
    process = start(target, "first", 60)
    wait_for(tmp_path / "started-first")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    with exclusive(target, done) as folder:
        assert folder is not None
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "part"]
        (folder / "done").touch()
    assert sorted(path.name for path in target.iterdir()) == ["done", "part"]


def test_of_two_processes_one_makes_and_the_other_waits(tmp_path: Path) -> None:
    target = tmp_path / "target"
    first = start(target, "first", 1)
    wait_for(tmp_path / "started-first")
    second = start(target, "second", 0)
    assert first.wait() == second.wait() == 0
    assert (target / "done").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["started-first", "target"]  # the second never began
