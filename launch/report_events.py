"""What a run's events mean to a person: words for the table, marks for the curve, lines for the summary."""

from __future__ import annotations

from typing import Any

# What an event is called, and the kind of mark that it gets in the curve; none where nothing was out of turn.
EVENTS: dict[str, tuple[str, str | None]] = {
    "start": ("started", None),
    "resume": ("resumed", "resume"),
    "fork": ("forked", "resume"),
    "interrupt": ("interrupted", "resume"),
    "converted": ("checkpoint converted", "resume"),
    "checkpoint_failed": ("checkpoint not written", "checkpoint"),
    "passed_over_checkpoint": ("damaged checkpoint not used", "checkpoint"),
    "nonfinite": ("not finite", "divergence"),
    "spike": ("loss spike", "divergence"),
    "finish": ("finished", None),
}
ACTIONS = {"stop": "stopped", "skip": "update skipped", "rollback": "rolled back", "report": "only reported"}
BEGINNINGS = ("start", "resume", "fork")  # after these, what is measured is measured anew


def words(event: dict[str, Any]) -> str:
    """What happened: "loss spike, rolled back". An event that is not known here keeps its name."""
    name = str(event.get("event"))
    action = ACTIONS.get(str(event.get("action")))
    return EVENTS.get(name, (name, None))[0] + (f", {action}" if action else "")


def mark(event: dict[str, Any]) -> str | None:
    """The kind of mark in the curve: "divergence", "checkpoint" or "resume"; None for no mark."""
    return EVENTS.get(str(event.get("event")), ("", None))[1]


def marks(events: list[dict[str, Any]], axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The marks that the page draws: their kind, their text and their place on every axis."""
    return [
        {"kind": kind, "words": words(event), "message": str(event.get("message", ""))}
        | {axis: event[axis] for axis in axes}
        for event in events
        if (kind := mark(event))
    ]


def divergence(events: list[dict[str, Any]]) -> str:
    """What became of divergence: "12 batches passed over, 1 update skipped"; empty where there was none."""
    found = [event for event in events if mark(event) == "divergence"]
    actions = [event.get("action") for event in found]
    positions = {
        p for event in found if event.get("action") == "rollback" for p in event.get("positions", ())
    }
    counts = (
        (len(positions), "batch", "es", "passed over"),
        (actions.count("skip"), "update", "s", "skipped"),
        (actions.count("report"), "spike", "s", "only reported"),
        (actions.count("stop"), "stop", "s", ""),
    )
    return ", ".join(f"{n} {one}{many * (n != 1)} {what}".rstrip() for n, one, many, what in counts if n)


def lineage(events: list[dict[str, Any]]) -> str:
    """Where a fork comes from: "forked from runs/a at step 300: changed schedule, horizon"; else empty."""
    forks = [event for event in events if event.get("event") == "fork"]
    if not forks:
        return ""
    fork = forks[-1]
    changed = ", ".join(map(str, fork.get("changed") or ["nothing"]))
    return f"forked from {fork.get('parent')} at step {fork.get('parent_step', 0):,}: changed {changed}"


def ending(events: list[dict[str, Any]]) -> str:
    """Why a run that has not reached its horizon is not there yet."""
    last = events[-1] if events else {}
    if last.get("event") == "interrupt":
        return "interrupted"
    return "stopped on divergence" if last.get("action") == "stop" else "unfinished"


def tokens_after(event: dict[str, Any]) -> float | None:
    """Tokens trained on at which measuring begins anew after the event; None where it goes on."""
    if event.get("to_step") is not None:  # a rollback
        return event["tokens"] * event["to_step"] / event["step"] if event["step"] else 0
    return event["tokens"] if event.get("event") in BEGINNINGS else None
