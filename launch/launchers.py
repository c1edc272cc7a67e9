"""How the process of a run is started: on this machine, by itself or by torchrun, or as a job of Slurm.

A launcher gives what a pool waits for, whichever it is.
"""

from __future__ import annotations

import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import submitit
from submitit.core.utils import DelayedSubmission, pickle_load

from data.cli import one_line
from data.files import write
from train.ranks import ROOT, bound_to
from train.stop import REQUEUE, SIGNALS

OUTPUT = "output.txt"  # in a run's directory: what its processes said
JOB = "slurm.txt"  # in a run's directory: the number of its last job
PORT = 29400  # where the nodes of a job meet
LOOK, ASK = 1.0, 30.0  # seconds between two looks for a job's result, and two questions to Slurm
LATE = 10.0  # seconds for a result to be seen here that another machine has written


class Process(Protocol):
    """What a pool does with the process of a task; as of subprocess.Popen."""

    def wait(self) -> int: ...

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    def start(
        self, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], directory: Path
    ) -> Process:
        """The process of a run. arguments: those of `python -m train`. ranks: on each node. environment: of
        the process, where it is one of this machine. directory: of the run, which is there."""
        ...


class Here:
    """On this machine. torchrun: starts the ranks, instead of `python -m train` itself."""

    def __init__(self, torchrun: bool = False) -> None:
        self.torchrun = torchrun

    def start(
        self, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], directory: Path
    ) -> subprocess.Popen[bytes]:
        """Ends with this process."""
        command = [*(_torchrun(ranks) if self.torchrun else [sys.executable]), "-m", "train", *arguments]
        with open(directory / OUTPUT, "ab") as output:
            return subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C reaches it through us alone
                preexec_fn=self._bound(),
            )

    def _bound(self) -> Callable[[], None]:
        bound = bound_to(os.getpid())

        def prepare() -> None:
            bound()
            if self.torchrun:  # which would leave them blocked
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

        return prepare


def _torchrun(ranks: int, *more: str) -> list[str]:
    own = more or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *own]


@dataclass
class Torchrun:
    """What a job of Slurm does on each of its nodes: its share of the ranks of a run."""

    arguments: tuple[str, ...]
    ranks: int
    threads: str
    output: str

    def __call__(self) -> int:
        """The exit code of torchrun."""
        job = submitit.JobEnvironment()
        where = []
        if job.num_nodes > 1:
            where = [
                f"--nnodes={job.num_nodes}",
                f"--node-rank={job.node}",
                f"--master-addr={job.hostnames[0]}",
                f"--master-port={PORT}",
            ]
        command = [*_torchrun(self.ranks, *where), "-m", "train", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": self.threads}
        with open(self.output, "ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        self.process = process.pid
        return process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """What goes on when Slurm, which is about to end the job, has put it into the queue again. The run
        has saved when this returns."""
        os.kill(self.process, signal.SIGTERM)
        # Not Popen.wait, in which the main thread is that a signal's handler interrupts.
        os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Torchrun(self.arguments, self.ranks, self.threads, self.output))


class Slurm:
    """As jobs of a Slurm cluster, of which this machine is a login node; all share the file system.

    A job goes on if this process ends, and is found again by the next. One that Slurm ends, for its time is
    over or others come first, saves and is put into the queue again.

    Args:
        folder: where submitit keeps its files.
        parameters: of submitit.AutoExecutor, such as timeout_min, nodes, gpus_per_node, slurm_partition.

    Raises:
        ValueError: there is no Slurm here, or it does not know a parameter.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Any]) -> None:
        setup = [f"cd {shlex.quote(str(ROOT))}", *parameters.get("slurm_setup", [])]
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
            self.executor.update_parameters(**parameters, tasks_per_node=1)
            self.executor.update_parameters(slurm_setup=setup)
        except RuntimeError as error:
            raise ValueError(f"launcher: slurm: {one_line(error)}; start on a login node") from None
        except (NameError, TypeError, ValueError) as error:
            raise ValueError(f"slurm: {one_line(error)}") from None

    def start(
        self, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], directory: Path
    ) -> Job:
        """Its job that is in the queue, or else a new one."""
        noted = directory / JOB
        folder = self.executor.folder
        number = noted.read_text().strip() if noted.exists() else ""
        if number and queued(number):
            return Job(submitit.SlurmJob(folder=folder, job_id=number), directory)
        output = str((directory / OUTPUT).absolute())
        threads = environment["OMP_NUM_THREADS"]
        self.executor.update_parameters(name=directory.name)
        try:
            job = self.executor.submit(Torchrun(tuple(arguments), ranks, threads, output))
        except (OSError, submitit.core.utils.FailedJobError) as error:
            raise ValueError(f"slurm: {one_line(error)}") from None
        write(noted, f"{job.job_id}\n")
        return Job(job, directory)


class Job:
    """A job of Slurm as a pool's process. Signals end the waiting for it, not the job."""

    def __init__(self, job: submitit.Job[int], directory: Path) -> None:
        self.job, self.directory = job, directory
        self._left = threading.Event()

    def poll(self) -> int | None:
        """The exit code, where it is known."""
        return self.wait() if self._result.exists() or self._left.is_set() else None

    def wait(self) -> int:
        """The exit code of the run; REQUEUE where nobody waits for it any more."""
        asked = time.monotonic()
        while not self._result.exists():
            if self._left.wait(LOOK):
                return REQUEUE
            if time.monotonic() - asked > ASK:
                asked = time.monotonic()
                if not queued(self.job.job_id) and not self._appears():
                    return self._lost()
        try:
            outcome, result = pickle_load(self._result)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            return self._lost()
        return result if outcome == "success" else self._lost()

    def send_signal(self, number: int) -> None:
        self._left.set()

    def kill(self) -> None:
        self._left.set()

    @property
    def _result(self) -> Path:
        return self.job.paths.result_pickle

    def _appears(self) -> bool:
        """Whether a result is there after all, on a file system that shows it late."""
        end = time.monotonic() + LATE
        while not self._result.exists() and time.monotonic() < end:
            time.sleep(LOOK)
        return self._result.exists()

    def _lost(self) -> int:
        with open(self.directory / OUTPUT, "a", encoding="utf-8") as output:
            output.write(
                f"job {self.job.job_id} of Slurm ended without the run: see {self.job.paths.stderr}\n"
            )
        return 1


def queued(number: str) -> bool:
    """Whether Slurm still has a job, waiting or running; True where it does not answer, for it may."""
    command = ["squeue", "--noheader", "--jobs", number]
    try:
        found = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError("launcher: slurm: no squeue here; start on a login node") from None
    unknown = b"Invalid job id" in found.stderr  # which is long over
    return bool(found.stdout.strip()) or (found.returncode != 0 and not unknown)
