"""A rank that hangs is named: on real processes that wait for each other, two in a world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import timeit
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny import ROOT
from train.watchdog import State, Watchdog, report, who_hangs

# Forks every world's ranks, so that torch is imported once; writes what came of each rank, and its stderr.
RANKS = '''
import ctypes, json, os, signal, socket, sys, threading, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from train import watchdog
from train.watchdog import Watchdog

TIMEOUT, LONG, END = 3.0, 4.5, 40.0  # LONG: of the worlds in which nothing is to happen
watchdog.SLACK = 2.0
folder = Path(sys.argv[1])


def wait():
    dist.all_reduce(torch.ones(1))


def broadcast(value):
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def restoring(dog, rank):
    """Rank 0 reads a checkpoint for longer than the time-out."""
    dog.mark(0, watchdog.RESTORE)
    time.sleep(4.0 if rank == 0 else 0.0)
    wait()


def get_lost():
    time.sleep(60)


def keep_the_lock():
    ctypes.PyDLL(None).sleep(60)


def stand_still():
    os.kill(os.getpid(), signal.SIGSTOP)


def in_a_step(dog, act):
    dog.mark(11, "data")
    wait()
    dog.mark(12, "forward")
    time.sleep(0.5)  # for the mark to be told
    act()
    dog.mark(12, "backward")
    wait()


def healthy(dog, rank):
    for step in range(20):
        dog.mark(step, "data")
        time.sleep(0.1)
    wait()


def suspended(dog, rank):
    """All stand still for longer than the time-out, and are then told to go on."""
    for step in range(20):
        dog.mark(step, "data")
        time.sleep(0.1)
    wait()


def slow_start(dog, rank):
    """Rank 1 is late by more than the time-out in two marks, neither of which takes as long."""
    for part in range(2):
        dog.mark(0, f"part {part}")
        time.sleep(2.7 * rank)
    wait()


WORLDS = {
    "sleeps": lambda dog, rank: in_a_step(dog, get_lost if rank == 1 else lambda: None),
    "same_mark": lambda dog, rank: in_a_step(dog, get_lost if rank == 1 else wait),
    "stopped": lambda dog, rank: in_a_step(dog, stand_still if rank == 1 else lambda: None),
    "stopped_0": lambda dog, rank: in_a_step(dog, stand_still if rank == 0 else lambda: None),
    "holds": lambda dog, rank: in_a_step(dog, keep_the_lock if rank == 1 else lambda: None),
    "healthy": healthy,
    "suspended": suspended,
    "slow": slow_start,
    "restoring": restoring,
    "alone": lambda dog, rank: in_a_step(dog, get_lost),
}


def be_rank(name, rank, size, port):
    os.dup2(os.open(folder / f"{name}-{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if name == "stopped_0":  # as under deepspeed, rank 0 hosts the store, and stands still with it
        del address["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    wait()  # once, for all connections to be made
    (folder / name).mkdir(exist_ok=True)
    timeout = LONG if name in ("healthy", "suspended", "slow") else TIMEOUT
    dog = Watchdog(SimpleNamespace(rank=rank, size=size, broadcast=broadcast), timeout, folder / name)
    WORLDS[name](dog, rank)
    dog.close()
    assert not dog._thread.is_alive()
    os._exit(0)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def end_all(signum, frame):
    for pid in set(processes) - set(ended):
        os.kill(pid, signal.SIGKILL)
    sys.exit("ended before its time")


processes, ended = {}, {}
signal.signal(signal.SIGTERM, end_all)
ports = {name: free_port() for name in WORLDS}
for name in WORLDS:
    for rank in range(1 if name == "alone" else 2):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            be_rank(name, rank, 1 if name == "alone" else 2, ports[name])
        processes[pid] = name, rank
# Made after the forks: a forked thread would serve nobody.
stores = [
    TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for name, port in ports.items()
    if name != "stopped_0"
]
start = time.monotonic()
asleep = [pid for pid, (name, _) in processes.items() if name == "suspended"]
actions = [(1.0, signal.SIGSTOP), (7.0, signal.SIGCONT)]
while len(ended) < len(processes) and time.monotonic() - start < END:
    for pid in set(processes) - set(ended):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic() - start
    if actions and time.monotonic() - start > actions[0][0]:
        number = actions.pop(0)[1]
        for pid in asleep:
            os.kill(pid, number)
    gone = {name for pid, (name, _) in processes.items() if pid in ended}
    both = {"stopped": 1, "stopped_0": 1, "holds": 1}  # one of their ranks never ends
    if all(pid in ended or (name in both and name in gone) for pid, (name, _) in processes.items()):
        break
    time.sleep(0.05)
for pid in set(processes) - set(ended):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print(json.dumps({f"{name}-{rank}": ended.get(pid) for pid, (name, rank) in processes.items()}))
os._exit(0)
'''


@dataclass
class Outcome:
    """codes: the exit code of each rank, None of those that had to be killed. errors: their stderr."""

    codes: list[int | None]
    errors: list[str]
    report: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("worlds")
    # The store looks up who connects to it: where no name server answers, let that not take 5 seconds.
    environment = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANKS, folder]
    ranks = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        out, _ = ranks.communicate(timeout=90)
    finally:
        ranks.terminate()
        ranks.wait()
    assert ranks.returncode == 0
    ended = json.loads(out)
    found = {}
    for name in sorted({key.rpartition("-")[0] for key in ended}):
        keys = sorted(key for key in ended if key.rpartition("-")[0] == name)
        text = folder / name / "hang.txt"
        found[name] = Outcome(
            [ended[key] and ended[key][0] for key in keys],
            [(folder / f"{key}.err").read_text() for key in keys],
            text.read_text() if text.exists() else "",
        )
    return found


def the_report(outcome: Outcome) -> str:
    """What one rank alone said, and wrote to the file."""
    assert outcome.report.count("no progress") == 1
    text = outcome.report[outcome.report.index("no progress") :].strip()
    assert sum("no progress" in error for error in outcome.errors) == 1
    assert any(text + "\n" in error for error in outcome.errors)
    return text


def test_a_rank_that_sleeps_is_named_with_its_stack(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["sleeps"]
    assert outcome.codes == [1, 1]
    lines = the_report(outcome).splitlines()
    assert lines[0] == "no progress for 3 s: rank 1 hangs. All ranks end now; the same command goes on"
    assert lines[1].startswith("rank 1 (pid ") and lines[1].endswith("), step 12, forward:")
    assert any(line.endswith(", in get_lost") for line in lines)
    assert lines[-1].startswith("rank 0: step 12, backward, waits for others in ")
    assert lines[-1].endswith(", in wait")


def test_at_the_same_mark_it_is_the_one_that_is_in_no_collective(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["same_mark"]
    assert outcome.codes == [1, 1]
    said = the_report(outcome)
    assert "rank 1 hangs" in said and ", in get_lost" in said
    assert said.splitlines()[-1].startswith("rank 0: step 12, forward, waits for others")


def test_a_process_that_stands_still_is_named(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["stopped"]
    assert outcome.codes == [1, None]
    said = the_report(outcome)
    assert "rank 1 hangs" in said and ") does not answer; last mark: step 12, forward\n" in said
    assert said.splitlines()[-1].startswith("rank 0: step 12, backward, waits for others")


def test_where_the_store_stands_still_each_rank_speaks_for_itself(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["stopped_0"]
    assert outcome.codes == [None, 1]
    said = the_report(outcome)
    assert said.startswith("no progress for 3 s: rank 1 waits or hangs, and the ranks' store at 127.0.0.1:")
    assert "\nrank 1 (" in said and ", in wait" in said


def test_the_stack_comes_out_even_where_no_thread_can_run(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["holds"]
    assert outcome.codes == [1, None]
    said = the_report(outcome)
    assert "rank 1 hangs" in said and "does not answer; last mark: step 12, forward" in said
    assert "keep_the_lock" in outcome.errors[1]


def test_one_rank_alone_is_watched_too(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["alone"]
    assert outcome.codes == [1]
    assert ", in get_lost" in the_report(outcome)


@pytest.mark.parametrize("name", ["healthy", "suspended", "slow"])
def test_ranks_that_go_on_are_left_alone(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.codes == [0, 0]
    assert outcome.report == "" and not any("no progress" in error for error in outcome.errors)


def state(rank: int, marks: int = 5, **more: Any) -> State:
    told = State(rank, f"pid {rank}", marks, 12, "forward", 3.0, 1, stack="  File x\n")
    return replace(told, **more)


def test_who_hangs() -> None:
    waiting = [state(rank, waits=True) for rank in range(4)]
    assert who_hangs(waiting) == []
    late, silent, away = replace(waiting[2], marks=4), replace(waiting[1], stack=""), state(0, 1, ticks=-1)
    assert who_hangs([*waiting[:2], late, waiting[3]]) == [late]
    assert who_hangs([waiting[0], silent, late]) == [silent]
    assert who_hangs([*waiting[:3], state(3)]) == [state(3)]
    assert who_hangs([away, *waiting[1:3], state(3)]) == [state(3)]


def test_equal_stacks_are_shown_once() -> None:
    states = [state(rank, waits=True) for rank in (0, 1, 2, 5, 6)]
    text = report(states, [], 900.0)
    assert text.startswith("no progress for 900 s: all ranks wait for each other in collectives. ")
    assert (
        text.count("  File x") == 1
        and "\nranks 0-2, 5-6 (pid 0; pid 1; pid 2; pid 5; …), step 12, forward:" in text
    )


def test_a_mark_costs_next_to_nothing(tmp_path: Path) -> None:
    world: Any = SimpleNamespace(rank=0, size=1)
    dog = Watchdog(world, 900, tmp_path)
    try:
        seconds = min(timeit.repeat(lambda: dog.mark(1, "data"), number=10_000, repeat=5)) / 10_000
    finally:
        start = time.monotonic()
        dog.close()
    assert seconds < 3e-6  # 0.3 on a quiet machine
    assert time.monotonic() - start < 1 and not dog._thread.is_alive()
