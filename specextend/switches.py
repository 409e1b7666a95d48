"""Changes things while somebody needs them changed, and puts them back behind the last one.

Two forwards of one model may run beside each other in two threads. What both want changed about it
is changed by the first that begins and put back by the last that ends; nobody waits for another's
forward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

#: puts back what was changed
Undo = Callable[[], None]

_lock = threading.Lock()


@dataclass
class _Switch:
    """Counts who needs a change."""

    undo: Undo
    users: int = 0


_switches: dict[Hashable, _Switch] = {}


@contextlib.contextmanager
def switched(changes: Mapping[Hashable, Callable[[], Undo]]):
    """Have things changed for a ``with`` block, in which any number of threads may be at once.

    Args:
        changes: by a key that is the same for the same change of the same thing, what makes it and
            returns what puts it back. Both are called under a lock, and must be short.
    """
    made: list[Hashable] = []
    try:
        with _lock:
            for key, change in changes.items():
                if key not in _switches:
                    _switches[key] = _Switch(change())
                _switches[key].users += 1
                made.append(key)
        yield
    finally:
        with _lock:
            for key in made:
                _switches[key].users -= 1
                if not _switches[key].users:
                    _switches.pop(key).undo()
