"""The erasure code: how the bytes of lost nodes come back from the nodes that are left.

Pure: no clock, no randomness, no I/O.  `Code` computes, `stripe` says which byte
lies where, `groups` says which nodes protect each other.
"""

from __future__ import annotations

from ckptd.erasure.code import Code

__all__ = ["Code"]
