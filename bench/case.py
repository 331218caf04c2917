"""What a family's benchmark file yields."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One row of the table: our call, everything it is compared with, and what bounds it.

    bench_<family>.py has `OPS`, the names of its ops (without it they are found by running the generator), and
    `cases(quick, device)`, a generator: each case is measured before the next one is built, so only one case's data is
    alive at a time. Every callable takes no argument, has been given its data by closure, and
    does the whole job each time (same inputs, same allocation rule on both sides). What works in place goes on from its
    last result instead, and is not quick: tests compare the results of quick cases.
    """

    op: str  # public name: "gmm_log_prob"
    name: str  # size and variant, as a person would say it: "100k x 16, 32 full, forward"
    ours: Callable[[], Any]
    rivals: dict[str, Callable[[], Any] | str]  # name -> callable, or why it is absent ("not installed")
    dtype: str = "float32"
    threads: int | None = None  # None: torch's own number
    bytes: float = 0.0  # that must move, each input read once and each output written once
    flops: float = 0.0  # multiply and add counted as two
    exps: float = 0.0  # exponentials that must be taken
    normals: float = 0.0  # normal numbers that must be made
    error: Callable[[], float] | None = None  # ours against float64: max |difference| / max |reference|
    rival_error: Callable[[], float] | None = None  # the same for the best rival
    parts: dict[str, float] = field(default_factory=dict)  # rival -> share of the job in its call; say so in note
    goals: dict[str, float] = field(default_factory=dict)  # rival ("fastest": whichever is) -> least ratio rival / ours
    share_goal: float = 0.0  # least share of the ceiling
    note: str = ""
