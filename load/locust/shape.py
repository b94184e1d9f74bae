"""The rig's load shapes as Locust's.

Lives here: `StagedShape`. Rules: Locust is told how many users there are to be; what a storm drops,
and who publishes how often, is the workers' affair (`rig`), by the same text. Must not come in:
what a shape means (`pace`), reading its text (`load.shapes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from locust import LoadTestShape

from load.locust.arguments import shape_of
from load.locust.pace import users_and_rate

if TYPE_CHECKING:
    from locust import User

    from load.shapes import Shape

__all__ = ["StagedShape"]


class StagedShape(LoadTestShape):
    """Follows `--shape`; without one it is taken out before a run (`run`)."""

    # Keeps the page's fields for users and rate, which hold without a shape.
    use_common_options = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Locust's is not annotated
        self._text = ""
        self._shape: Shape | None = None

    def tick(self) -> tuple[int, float] | tuple[int, float, list[type[User]] | None] | None:
        """Return users and spawn rate of now; None at the end."""
        options = getattr(self.runner and self.runner.environment, "parsed_options", None)
        text = str(getattr(options, "shape", ""))
        if text != self._text:
            self._text, self._shape = text, shape_of(text)
        return None if self._shape is None else users_and_rate(self._shape, self._seconds())

    def _seconds(self) -> float:
        return float(self.get_run_time())  # type: ignore[no-untyped-call]
