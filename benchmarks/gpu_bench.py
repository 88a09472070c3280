"""Time on a GPU and tables of it, for `gpu.py`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

METHODS = ("bf16", "fast", "dense")
CAPTURED = 20  # calls in a graph, at least
_FEWEST = 5  # timings that make a median


@dataclass(frozen=True)
class Row:
    """One measured number. ``value`` is None where it could not be measured; ``note`` says why."""

    part: str
    case: str
    method: str
    value: float | None
    unit: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"not measured: {self.note}"
        return f"{self.value:.4g} {self.unit}" + (f" ({self.note})" if self.note else "")


class TimeIsUp(Exception):
    """A part's share of the time is spent."""


@dataclass
class Bench:
    """A device, and how long each measurement and each part may take, in seconds."""

    device: torch.device
    seconds: float = 0.1
    deadline: float = field(default=math.inf)

    @property
    def l2(self) -> int:
        """Bytes of the device's cache."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def give(self, seconds: float) -> None:
        """Let the next part take so long."""
        self.deadline = time.monotonic() + seconds

    def check(self) -> None:
        """Raise `TimeIsUp` behind the deadline."""
        if time.monotonic() > self.deadline:
            raise TimeIsUp

    def turns(self, nbytes: int) -> int:
        """How many inputs of a size take turns so that none is found in the cache."""
        return max(2, math.ceil(3 * self.l2 / nbytes)) if self.l2 else 1

    def milliseconds(
        self, calls: Sequence[Callable[[], object]], *, graph: bool = True, most: int = 200
    ) -> float:
        """Of one of ``calls``, which take turns: the median of rounds.

        What they give is kept until the round ends, so that each writes to memory of its own.
        ``graph``: rounds are replayed from a CUDA graph, which leaves out what Python takes to
        launch; ``most``: so many rounds at most, each run twice. Raises `TimeIsUp` behind the
        deadline.
        """
        self.check()
        for call in calls:
            call()
        round_ = list(calls)
        if graph and self.device.type == "cuda":
            round_ *= math.ceil(CAPTURED / len(calls))
            torch.cuda.synchronize()
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                written = [call() for call in round_]
            del written
            times = self._rounds(captured.replay, most)
        else:
            times = self._rounds(lambda: [call() for call in round_], most)
        return statistics.median(times) / len(round_)

    def _rounds(self, run: Callable[[], object], most: int) -> list[float]:
        times: list[float] = []
        end = time.monotonic() + self.seconds
        while len(times) < most and (len(times) < _FEWEST or time.monotonic() < end):
            times.append(self._once(run))
        return times

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # meanwhile the launch of what is timed gets ahead of the device
        begin.record()
        run()
        done.record()
        done.synchronize()
        return float(begin.elapsed_time(done))


def trained(rows: int, cols: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """A bf16 matrix that is distributed as trained ones are: rows of several sizes, few outliers.

    Its exponents have about 2.6 bits of entropy.
    """
    generator = torch.Generator(device).manual_seed(seed)
    sizes = torch.randn(rows, 1, device=device, generator=generator).mul(0.3).exp() * 0.02
    weight = torch.randn(rows, cols, device=device, generator=generator)
    return (weight * sizes).bfloat16()


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each case, a column for each layout, and one for all other methods."""
    lines = ["| part | case | bf16 | fast | dense | others |", "|---|---|---|---|---|---|"]
    cases: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        own = row.method in METHODS
        cells = cases.setdefault((row.part, row.case), {})
        cells.setdefault(row.method if own else "", []).append(
            str(row) if own else f"{row.method}: {row}"
        )
    for (part, case), cells in cases.items():
        columns = ("<br>".join(cells.get(method, [])) for method in (*METHODS, ""))
        lines.append(f"| {part} | {case} | {' | '.join(columns)} |")
    return "\n".join(lines)
