"""What the settings mean for the decoder: one place for all who decode.

Lives here: settings → `Limits`, and the oldest time that is safe. Rules: the service and the replay
of dead letters judge a message by the same limits, since both take them from here. Must not come
in: decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowsvc.shadow.document import Limits

if TYPE_CHECKING:
    from shadowsvc.settings import Settings

__all__ = ["decoder_limits", "max_age_us"]

_GC_GRACE_MARGIN = 0.1
_SECOND_US = 1_000_000


def decoder_limits(settings: Settings) -> Limits:
    """Return the limits of the settings; `max_age_us` of the table is still to be set."""
    shadow = settings.shadow
    return Limits(
        max_payload_bytes=shadow.max_payload_bytes,
        max_depth=shadow.max_depth,
        max_leaves=shadow.max_leaves,
        max_path_bytes=shadow.max_path_bytes,
        max_user_properties=shadow.max_user_properties,
        max_user_properties_bytes=shadow.max_user_properties_bytes,
        unit=shadow.timestamp_unit,
        max_ahead_us=int(shadow.max_ahead_seconds * _SECOND_US),
        on_future=shadow.on_future,
        on_ancient=shadow.on_ancient,
    )


def max_age_us(gc_grace_seconds: int) -> int:
    """Return the age above which an update could bring back what was deleted, in microseconds.

    Nine tenths of the table's `gc_grace_seconds`: deletes are forgotten after the whole.
    """
    return int(gc_grace_seconds * (1 - _GC_GRACE_MARGIN)) * _SECOND_US
