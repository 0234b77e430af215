"""The version of every ckptd protocol: trainer and daemon, daemon and peers, daemon and coordinator.

It is the first thing that two sides tell each other; a mismatch is refused before
anything is written.
"""

from __future__ import annotations

PROTOCOL = 1
