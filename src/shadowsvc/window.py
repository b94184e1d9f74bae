"""The window: how many requests may be at Cassandra at once.

Theory. The right number is not known and changes: too few leave Cassandra idle, too many only queue
there, and in the end they time out. So the window grows while it is full and answers come in good
time, and shrinks by a factor when Cassandra says or shows that it is too much:

1. *Growth* is by one an answer at first, by one a round trip then, and careful where overload was
   met last: there by one in a while that doubles each time, for a time-out costs more than a place
   brings.
2. *Overload*: requests were refused for it, or timed out; one alone among many that were not says
   nothing. The window is halved, once for all that were sent before, since they tell of the same
   moment. When nothing at all was answered meanwhile it is an outage, which says nothing about the
   right size.
3. *Latency*: the median of an interval is far above what is usual, in two intervals running, or
   above it for long. What is usual is learned while the window is not what holds requests back,
   from the first answers on; it falls fast and rises slowly. At its minimum the window is never
   what makes Cassandra slow: there it rises fast.

Latency alone proves nothing: a loaded machine answers late whatever the window is. So a smaller
window for its sake is a *trial*, and throughput is the judge: if it fell with the window, the
window was not the cause, is restored, and the latency is usual from now on. So a noisy machine ends
at the upper bound, not at the lower one. The idea is that of Vector's adaptive concurrency and of
Netflix' gradient limits.

Rules: pure; times and latencies in seconds of any steady clock are handed in; a request costs a few
additions, and half a second a median. Must not come in: queues, retries, tasks.
"""

from __future__ import annotations

from collections import Counter
from statistics import median

__all__ = ["MAX_IN_FLIGHT", "REASONS", "Window"]

MAX_IN_FLIGHT = 256
"""Requests at one acsylla cluster at most: its completions go through a socket pair that takes 278
bytes, one each, and blocks the driver's thread when it is full."""

REASONS = ("growth", "overload", "latency", "restored")
"""Every reason for a change: the values of a metric label."""

_INTERVAL_SECONDS = 0.5
_MIN_SAMPLES = 16
_MAX_INTERVALS = 20
_OVERLOAD_FACTOR = 0.5
_LOST_SHARE = 0.05
_LATENCY_FACTOR = 0.7
_GOOD_TIMES_USUAL = 2.0
_BAD_TIMES_USUAL = 4.0
_BAD_INTERVALS = 2
_FELL = 0.9
_STEADY_INTERVALS = 4
_FAST_BELOW = 0.5
_CAREFUL_FROM = 0.75
_PATIENCE_SECONDS = 0.5
_MAX_PATIENCE_SECONDS = 16.0
_FAST = 0.3
_SLOW = 0.02
_RECENT = 0.1


class Window:
    """The limit of requests in flight: between `minimum` and `maximum`, at first `minimum`.

    `good_seconds` is a latency that is good whatever is usual: noise of a quick store is no sign.
    """

    __slots__ = (
        "_answered",
        "_bad",
        "_ceiling",
        "_due",
        "_exact",
        "_far",
        "_filled",
        "_last_cut",
        "_lost",
        "_next_step",
        "_patience",
        "_recent",
        "_samples",
        "_since",
        "_steady",
        "_trial",
        "_was_full",
        "changes",
        "good_seconds",
        "limit",
        "maximum",
        "minimum",
        "usual_seconds",
    )

    def __init__(
        self,
        minimum: int,
        maximum: int,
        *,
        now: float,
        good_seconds: float = 0.01,
        changes: Counter[str] | None = None,
    ) -> None:
        """Make it; `changes` is counted in, by reason. Raises `ValueError` for bad bounds."""
        if not 1 <= minimum <= maximum <= MAX_IN_FLIGHT:
            raise ValueError(f"1 <= {minimum} <= {maximum} <= {MAX_IN_FLIGHT} does not hold")
        self.minimum = minimum
        self.maximum = maximum
        self.good_seconds = good_seconds
        self.limit = minimum
        self.changes = Counter[str]() if changes is None else changes
        self.usual_seconds: float | None = None
        """The long-run median latency; None before anything is known."""
        self._exact = float(minimum)
        self._ceiling = self._far = 2.0 * maximum  # where overload happened, or out of reach
        self._patience = _PATIENCE_SECONDS
        self._next_step = now
        self._answered = False
        self._was_full = False
        self._recent = 0.0
        self._samples: list[float] = []
        self._filled = 0
        self._lost = 0
        self._since = now
        self._due = now + _INTERVAL_SECONDS
        self._bad = 0
        self._steady = 0
        self._last_cut = now - 1.0
        # The window, throughput and latency before a change that is on trial.
        self._trial: tuple[float, float, float] | None = None

    def sent(self, in_flight: int) -> None:
        """Note that a request was sent, which made `in_flight` of them.

        `limit` stands for as many as may be: nothing more of this kind may be sent.
        """
        if in_flight >= self.limit:
            self._filled += 1
            self._was_full = True

    def answered(self, now: float, seconds: float) -> None:
        """Note that a request succeeded at `now` and took `seconds`."""
        self._samples.append(seconds)
        self._answered = True
        self._recent += (seconds - self._recent) * _RECENT
        if now >= self._due:
            self._look(now)
        if self._was_full and self._trial is None and self.limit < self.maximum:
            self._grow(now)

    def overloaded(self, now: float, sent: float) -> None:
        """Note at `now` that a request sent at `sent` was too much, or timed out."""
        if sent < self._last_cut:
            return
        self._lost += 1
        if self._lost < min(_LOST_SHARE * len(self._samples), max(2.0, 0.1 * self.limit)):
            return  # one now and then is lost on any busy machine
        self._last_cut = now
        self._trial = None
        self._begin_interval(now)
        if self._answered:  # else it is an outage, which tells nothing of the right size
            self._too_much(self._exact)
            self._answered = False
        self._change(self._exact * _OVERLOAD_FACTOR, "overload")

    def _too_much(self, exact: float) -> None:
        """Remember a window that was too large; be more careful there each time."""
        again = exact >= self._ceiling * _CAREFUL_FROM
        doubled = min(2 * self._patience, _MAX_PATIENCE_SECONDS)
        self._patience = doubled if again else _PATIENCE_SECONDS
        self._ceiling = exact

    def _forget_ceiling(self) -> None:
        self._ceiling = self._far
        self._patience = _PATIENCE_SECONDS

    def _grow(self, now: float) -> None:
        usual = self.usual_seconds
        if usual is None:
            # The first few answers, while the window is small, say what is usual.
            if len(self._samples) >= _MIN_SAMPLES:
                self.usual_seconds = self._recent = median(self._samples)
            return
        if self._recent > max(usual * _GOOD_TIMES_USUAL, self.good_seconds):
            return
        exact, ceiling = self._exact, self._ceiling
        if exact < ceiling * _FAST_BELOW:
            self._exact = exact + 1.0  # by one an answer, which doubles it in a round trip
        elif exact < ceiling * _CAREFUL_FROM:
            self._exact = exact + 1.0 / exact  # by one a round trip
        elif now >= self._next_step:
            self._exact = exact + 1.0
            self._next_step = now + self._patience
            if exact > ceiling:
                self._forget_ceiling()
        if self._exact >= self.limit + 1:
            self._was_full = False
            self._change(self._exact, "growth")

    def _look(self, now: float) -> None:
        """Judge the interval that ends at `now`."""
        samples = self._samples
        count = len(samples)
        span = now - self._since
        if count < max(_MIN_SAMPLES, 2 * self.limit) and span < _MAX_INTERVALS * _INTERVAL_SECONDS:
            self._due = now + _INTERVAL_SECONDS
            return
        latency = median(samples)
        throughput = count / span
        full = 2 * self._filled >= count
        self._begin_interval(now)
        self._judge(latency, throughput, full=full)

    def _judge(self, latency: float, throughput: float, *, full: bool) -> None:
        """Learn from an interval, and change the window if its latency asks for it."""
        trial, self._trial = self._trial, None
        if trial is not None and full and not self._passed(trial, throughput):
            return
        usual = self.usual_seconds
        if usual is None:
            self.usual_seconds = latency
            return
        if latency < usual:
            self.usual_seconds = usual + (latency - usual) * _FAST
        elif not full:
            self.usual_seconds = usual + (latency - usual) * _SLOW
        elif self.limit == self.minimum:
            # So few can't be what makes Cassandra slow.
            self.usual_seconds = usual + (latency - usual) * _FAST
        if not full or latency <= max(usual * _GOOD_TIMES_USUAL, self.good_seconds):
            self._bad = self._steady = 0
            if self.limit == self.maximum:
                self._forget_ceiling()
            return
        self._steady += 1
        self._bad = self._bad + 1 if latency > usual * _BAD_TIMES_USUAL else 0
        if self._bad >= _BAD_INTERVALS or self._steady >= _STEADY_INTERVALS:
            self._try(throughput, latency)

    def _try(self, throughput: float, latency: float) -> None:
        """Make the window smaller for the next interval, which tells whether that was right."""
        self._bad = self._steady = 0
        if self.limit > self.minimum:
            self._trial = (self._exact, throughput, latency)
            self._change(self._exact * _LATENCY_FACTOR, "latency")

    def _passed(self, trial: tuple[float, float, float], throughput: float) -> bool:
        """Keep or undo the window that was on trial; False when it was undone."""
        exact, before, latency = trial
        if throughput >= before * _FELL:
            self._too_much(exact)
            return True
        # Fewer requests did less and did it no sooner: Cassandra is slow, not overloaded.
        self.usual_seconds = latency
        self._change(exact, "restored")
        return False

    def _begin_interval(self, now: float) -> None:
        self._samples = []
        self._filled = 0
        self._lost = 0
        self._since = now
        self._due = now + _INTERVAL_SECONDS

    def _change(self, exact: float, reason: str) -> None:
        self._exact = min(max(exact, float(self.minimum)), float(self.maximum))
        limit = int(self._exact)
        if limit != self.limit:
            self.limit = limit
            self.changes[reason] += 1
