"""Where the tasks of a corpus run: on the cores of this machine, on a Slurm cluster, or with Ray.

Each class makes datatrove's executor of its kind for one phase. The result is the same with any of them.
"""

import fcntl
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import connection, get_context, parent_process, set_forkserver_preload
from pathlib import Path
from typing import Any, Protocol

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from data.cli import one_line
from data.corpus.stage import StageError

ROOT = Path(__file__).resolve().parents[2]
WORKERS = "workers"  # a lock that the processes of a corpus hold while they live
# What every worker imports, imported once for all of them.
PRELOADED = ["data.corpus.files", "data.corpus.stage", "datatrove.executor", "datatrove.data"]


class Executor(Protocol):
    def make(self, steps: Sequence[PipelineStep], tasks: int, folder: Path, name: str) -> PipelineExecutor:
        """datatrove's executor of a phase, whose completions, errors and logs go to a folder."""
        ...


class Local:
    """On this machine. workers: processes at once; null is one for each core."""

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers: {workers} is less than 1; null takes all cores")
        self.workers = workers

    def make(self, steps: Sequence[PipelineStep], tasks: int, folder: Path, name: str) -> PipelineExecutor:
        return _Local(list(steps), tasks, min(self.workers or _cores(), tasks), logging_dir=str(folder))


class Slurm:
    """On a Slurm cluster, of which this machine is a login node; all share the file system.

    time: most of a task, as sbatch takes it. workers: tasks at once; null is all. memory: GB of a task.
    arguments: more of sbatch's, by name. Waits for the tasks; they go on if this process is killed, and are
    cancelled when it is started again.
    """

    def __init__(
        self,
        partition: str,
        time: str,
        workers: int | None = None,
        memory: int = 4,
        qos: str | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self.partition = partition
        self.time = time
        self.workers = workers
        self.memory = memory
        self.qos = qos
        self.arguments = arguments or {}

    def make(self, steps: Sequence[PipelineStep], tasks: int, folder: Path, name: str) -> PipelineExecutor:
        here = [shlex.quote(str(path)) for path in (ROOT, Path(sys.executable).parent)]
        return _Slurm(
            list(steps),
            tasks,
            self.time,
            self.partition,
            mem_per_cpu_gb=self.memory,
            workers=self.workers or -1,
            job_name=name,
            qos=self.qos,
            env_command=f"cd {here[0]}; export PYTHONPATH={here[0]} PATH={here[1]}:$PATH",
            sbatch_args={"wait": ""} | self.arguments,
            logging_dir=str(folder),
        )


class Ray:
    """On a Ray cluster, whose machines share the file system. workers: tasks at once; null is all."""

    def __init__(self, workers: int | None = None, memory: float = 4) -> None:
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("ray is not installed; pip install ray, or choose another executor") from None
        self.workers = workers
        self.memory = memory

    def make(self, steps: Sequence[PipelineStep], tasks: int, folder: Path, name: str) -> PipelineExecutor:
        return _Ray(
            list(steps), tasks, self.workers or -1, mem_per_cpu_gb=self.memory, logging_dir=str(folder)
        )


class _Reporting(PipelineExecutor):
    """Leaves a file about the error of a task, wherever it runs, for the process that waits for it."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        try:
            return super()._run_for_rank(rank, local_rank, node_rank)
        except Exception as error:
            message = one_line(error)
            if isinstance(error, StageError):
                message += f"; its trace is in {self.logging_dir.path}/logs/task_{rank:05d}.log"
            report = {
                # of a person or a machine, not of the code
                "mistake": isinstance(error, ValueError | OSError),
                "message": message,
                "trace": traceback.format_exc(),
            }
            folder = Path(self.logging_dir.path, "errors")
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".{rank:05d}"
            aside.write_text(json.dumps(report), encoding="utf-8")
            aside.replace(folder / f"{rank:05d}.json")  # whole, though others are ended meanwhile
            raise


class _Local(_Reporting, LocalPipelineExecutor):
    """Runs tasks in processes that end with this one.

    datatrove's own pool waits for ever for a worker that the kernel has killed, and outlives its parent.
    """

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        try:
            state = pickle.dumps(self)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(f"data.source.stages: cannot go to the workers: {one_line(error)}") from error
        set_forkserver_preload(PRELOADED)
        context = get_context("forkserver")
        taken = context.Value("i", 0)
        arguments = (state, ranks, taken, self.logging_dir.path)
        number = min(self.workers, len(ranks))
        workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(number)]
        try:
            for worker in workers:
                worker.start()
            left = {worker.sentinel: worker for worker in workers}
            while left:
                for sentinel in connection.wait(list(left)):
                    ended = left.pop(sentinel)  # type: ignore[arg-type]
                    ended.join()
                    if ended.exitcode:
                        return  # what is incomplete says why
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()
                    worker.join()


def _work(state: bytes, ranks: list[int], taken: Any, folder: str) -> None:
    """Run tasks, one after the other, until none is left; each from the same state of the stages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A lock of its own, for the one that tqdm shares between processes is told as leaked where one is ended.
    tqdm.set_lock(threading.RLock())
    lock, log = Path(folder).parent / WORKERS, Path(folder) / f"worker-{os.getpid()}.txt"
    with lock.open("w") as locked, log.open("w") as output:
        fcntl.flock(locked, fcntl.LOCK_SH)
        for descriptor in (1, 2):  # what any library prints
            os.dup2(output.fileno(), descriptor)
        while True:
            with taken.get_lock():
                number = taken.value
                taken.value += 1
            if number >= len(ranks):
                return
            pickle.loads(state)._run_for_rank(ranks[number])


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


class _Slurm(_Reporting, SlurmPipelineExecutor):
    def run(self) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            super().run()
            return
        try:
            # Tasks of a process that was killed would write the same files.
            subprocess.run(["scancel", "--me", f"--name={self.job_name}"], check=False, capture_output=True)
            super().run()
        except FileNotFoundError as error:
            raise ValueError(
                f"data.source.executor: no {error.filename} here; start on a login node"
            ) from None
        except subprocess.CalledProcessError:
            return  # sbatch --wait: a task failed; what is incomplete says why

    def launch_merge_stats(self) -> None:
        """One more job, for statistics that nobody reads."""


class _Ray(_Reporting, RayPipelineExecutor):
    pass


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
