"""Where tensors lie that a manifest describes by its layout's text instead of by boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ckptd.errors import CorruptCheckpoint, LayoutRefused, LayoutSyntax
from ckptd.image.manifest import Manifest
from ckptd.layout.resolve import Placement, resolve
from ckptd.layout.tiles import Tiles


def stored_tiles(manifest: Manifest) -> Mapping[str, Tiles]:
    """Returns the tiles of the manifest's tensors by name; places are indices of its objects.

    Raises:
        CorruptCheckpoint: the layout cannot be read, or does not fit tensors and mesh.
    """
    from ckptd.layout.language import parse

    assert manifest.layout is not None, "checked when the manifest was read"
    shapes = {t.name: t.shape for t in manifest.tensors if t.tiles is None}
    try:
        placement = resolve(
            parse(manifest.layout.text),
            parameters=dict(manifest.layout.parameters),
            mesh=dict(manifest.mesh),
            shapes=shapes,
        )
    except (LayoutRefused, LayoutSyntax) as error:
        raise CorruptCheckpoint(
            f"the layout {manifest.layout.name!a} of this checkpoint does not describe it",
            str(error),
            "use another checkpoint",
        ) from error
    return _ByLayout(manifest, placement, shapes)


class _ByLayout(Mapping[str, Tiles]):
    """Tiles made when they are asked for: a rank of a large job needs few of them."""

    def __init__(
        self, manifest: Manifest, placement: Placement, names: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._placement = placement
        self._names = names
        ranks = np.array([stored.rank for stored in manifest.objects], np.int64)
        # In the consolidated form the numbers of parts may be greater than those of ranks.
        self._index = np.full(max(manifest.world_size, ranks.max(initial=-1) + 1) + 1, -1, np.int64)
        self._index[ranks] = np.arange(len(ranks))

    def __getitem__(self, name: str) -> Tiles:
        if name not in self._names:
            raise KeyError(name)
        try:
            tiles = self._placement.tiles(name)
        except LayoutRefused as error:
            raise CorruptCheckpoint(
                f"the layout does not place {name}", str(error), "use another checkpoint"
            ) from error
        if len(tiles) and int(tiles.place.max()) >= len(self._index) - 1:
            raise CorruptCheckpoint(
                f"the layout places {name} on ranks that do not exist", "its mesh is too large"
            )
        places = self._index[tiles.place]
        if (places < 0).any():
            raise CorruptCheckpoint(
                f"{name} cannot be read",
                "the layout places it on a rank that has no file",
                "use another checkpoint",
            )
        return replace(tiles, place=places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
