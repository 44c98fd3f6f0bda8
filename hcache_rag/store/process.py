"""What the threads of a process share: one lock for what they know of open stores, and forks."""

from __future__ import annotations

import os
import threading

LOCK = threading.RLock()
"""Held for moments, while tables are looked at or changed; nobody waits or writes meanwhile.

The garbage collector may end a transaction at any time in any thread: of a generator that nobody
has any more. So it can be taken again by who has it, and it is the only one: of two, each thread
could have one and end a transaction that needs the other. A fork waits for it, and its child finds
everything whole.
"""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release
    )
