"""Every error that ckptd raises about the world, as one tree.

    CkptdError                     exit code 1
    +-- UnsafeObject               2   an object in the state has no safe form
    +-- UnsupportedOptimizer       2   an optimizer that cannot be kept
    +-- InvalidRequest             2   the request itself is wrong
    |   +-- RankTaken              2   a living trainer already holds this rank
    |   +-- LayoutSyntax           2   a layout's text is not of the language; has `line`, `column`, `hint`
    +-- CorruptImage               3   bytes did not match their digest or their form
    +-- CorruptCheckpoint          3   the same, of a stored checkpoint
    +-- NotEnoughCells             4   more was lost than the parity covers
    +-- NotFound                   5   no such job, snapshot or daemon
    +-- Unreachable                6   nobody answers there
    |   +-- ProtocolMismatch       6   somebody of another version answers
    +-- StateMismatch              7   the state does not fit the model
    +-- LayoutRefused              7   a layout is no bijection, or does not fit; has `rule`, `tensor`
    +-- NoSpace                    8   the memory sum does not fit
    +-- DeadlineExceeded           9
    +-- StaleGeneration            1   a newer generation exists; this process must end

A message says what happened, why, and what to do next.  Mistakes in our own code
are assertions, never a CkptdError.
"""

from __future__ import annotations


class CkptdError(Exception):
    """Something that ckptd could not do; `str(error)` is meant for the user."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        self.what = what
        self.why = why
        self.next = next
        text = what if not why else f"{what}: {why}"
        super().__init__(text if not next else f"{text}. Next: {next}")


class UnsafeObject(CkptdError):
    """An object in the state has no safe form; the message holds its path."""

    exit_code = 2


class UnsupportedOptimizer(CkptdError):
    """This optimizer's state cannot be kept; let the error propagate and choose another."""

    exit_code = 2


class InvalidRequest(CkptdError):
    """The request itself is wrong; nothing was changed."""

    exit_code = 2


class RankTaken(InvalidRequest):
    """A living trainer already holds this rank of this generation."""


class LayoutSyntax(InvalidRequest):
    """A layout's text is not of the language; `line` and `column` count from 1, `hint` says what to write.

    `excerpt` is the line with a caret under it, for the end of the message.
    """

    def __init__(self, what: str, *, line: int, column: int, hint: str = "", excerpt: str = "") -> None:
        self.line = line
        self.column = column
        self.hint = hint
        super().__init__(f"line {line}, column {column}: {what}", next=hint)
        if excerpt:
            self.args = (f"{self}\n{excerpt}",)


class CorruptImage(CkptdError):
    """Bytes did not match their digest or their form; nothing of them was used."""

    exit_code = 3


class CorruptCheckpoint(CkptdError):
    """A stored checkpoint's bytes did not match their digest or their form; nothing of them was used."""

    exit_code = 3


class NotEnoughCells(CkptdError):
    """More was lost than the parity covers; the message says how many were needed and found."""

    exit_code = 4


class NotFound(CkptdError):
    """No such job, snapshot or daemon."""

    exit_code = 5


class Unreachable(CkptdError):
    """Nobody answers there; training may go on without protection."""

    exit_code = 6


class ProtocolMismatch(Unreachable):
    """The other side speaks another version; nothing was written."""


class StateMismatch(CkptdError):
    """The stored state does not fit the model, optimizer or object it is loaded into."""

    exit_code = 7


class LayoutRefused(CkptdError):
    """A layout is no bijection, or does not fit the tensors; found before any byte was read."""

    exit_code = 7

    def __init__(self, what: str, *, rule: int = 0, tensor: str = "", why: str = "", next: str = "") -> None:
        self.rule = rule
        self.tensor = tensor
        super().__init__(what, why, next)


class NoSpace(CkptdError):
    """The memory sum does not fit; the message holds the numbers and who holds what."""

    exit_code = 8


class DeadlineExceeded(CkptdError):
    """The deadline passed before the work was done."""

    exit_code = 9


class StaleGeneration(CkptdError):
    """A newer generation exists: this process must end and change nothing more."""
