import importlib.util
import json
import os
import stat
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from data.cli import instantiate
from tests.data.corpus.made import corpus, files, stage, write

TEXTS = {f"{n:02}.txt": f"text {n} of some more words than that\n" * (n + 1) for n in range(12)}
STAGES = {"exact": stage("data.corpus.dedup.Exact")}
SLURM = stage("data.corpus.executors.Slurm", partition="cpu", time="01:00:00", workers=2)
# Runs the tasks of a job one after the other and, as --wait does, ends as the worst of them.
SBATCH = """#!/bin/bash
echo "$@" >> {folder}/calls
script="${{@: -1}}"
cat "$script" >> {folder}/scripts
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
worst=0
for task in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" >> {folder}/output 2>&1 || worst=1
done
echo "Submitted batch job 7"
exit $worst
"""
SRUN = """#!/bin/bash
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, for this machine alone; what they are told is in files beside them."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH.format(folder=folder),
        "srun": SRUN,
        "scontrol": "#!/bin/bash\necho here\n",
        "scancel": f'#!/bin/bash\necho "$@" >> {folder}/cancelled\n',
    }
    for name, script in commands.items():
        (folder / name).write_text(script)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_slurm_gives_the_same_files_as_this_machine(tmp_path: Path, cluster: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    here = corpus(paths, tmp_path / "here", STAGES).build(progress=False)
    there = corpus(paths, tmp_path / "there", STAGES, executor=SLURM).build(progress=False)
    assert files(there) == files(here)
    script = (cluster / "scripts").read_text()
    for line in (
        "--partition=cpu",
        "--time=01:00:00",
        "--array=0-2%2",
        "--wait",
        f"--job-name={there.name}-00",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "--qos" not in script
    assert f"--name={there.name}-00" in (cluster / "cancelled").read_text()
    assert (cluster / "calls").read_text().count("\n") == 3  # one job for each pass


def test_the_error_of_a_task_on_slurm_is_one_line(tmp_path: Path, cluster: Path) -> None:
    paths = write(tmp_path / "raw", TEXTS)
    (tmp_path / "raw" / "bad").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"^\S*bad: not UTF-8 at byte 0 .* iconv -t UTF-8, or leave it out$"):
        corpus(paths, tmp_path, {}, executor=SLURM).build(progress=False)


def test_slurm_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^data\.source\.executor: no scancel here; start on a login node"):
        corpus(write(tmp_path / "raw", TEXTS), tmp_path, {}, executor=SLURM).build(progress=False)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_must_be_installed() -> None:
    with pytest.raises(ValueError, match=r"^data\.source\.executor: ray is not installed; pip install ray"):
        instantiate(OmegaConf.create({"_target_": "data.corpus.executors.Ray"}), "data.source.executor")


def test_workers_are_at_least_one() -> None:
    node = OmegaConf.create({"_target_": "data.corpus.executors.Local", "workers": 0})
    with pytest.raises(ValueError, match=r"^data\.source\.executor\.workers: 0 is less than 1"):
        instantiate(node, "data.source.executor")


def test_what_workers_print_is_in_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = corpus(write(tmp_path / "raw", TEXTS), tmp_path, STAGES).build(progress=False)
    assert json.loads((folder / "card.json").read_text())["final"]["documents"]
    assert capfd.readouterr() == ("", "")
