"""Doors of other people's tools into ckptd: each is imported only by those who use it."""

from __future__ import annotations
