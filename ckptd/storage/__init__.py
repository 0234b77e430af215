"""Checkpoints on storage: files, their digests, and a manifest that is written last."""

from __future__ import annotations
