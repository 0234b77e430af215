"""Durable checkpoints hold a fingerprint of every logical tensor, the same whatever the layout was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ckptd
from ckptd.layout.fingerprint import fingerprint
from ckptd.layout.placements import Replicate, Shard, Strided, tiles
from ckptd.storage.assemble import table
from ckptd.storage.parts import LocalTensor, Part

DIGEST = bytes(16)


def test_saved_tensors_have_the_fingerprints_of_their_values(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    state = {
        "f32": torch.randn(7, 5, generator=generator),
        "bf16": torch.randn(3, 4, 2, generator=generator).to(torch.bfloat16),
        "f64": torch.randn(6, generator=generator, dtype=torch.float64),
        "bool": torch.rand(9, generator=generator) > 0.5,
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    ckptd.save(str(tmp_path / "c"), state)
    with ckptd.open(str(tmp_path / "c")) as checkpoint:
        stored = checkpoint.manifest.fingerprints
    assert stored is not None and stored.keys() == state.keys()
    words = {torch.bfloat16: torch.uint16}
    for name, tensor in state.items():
        assert stored[name] == fingerprint(tensor.view(words.get(tensor.dtype, tensor.dtype)).numpy()), name


@pytest.mark.parametrize(
    "placements", [[Shard(0), Replicate()], [Shard(1), Shard(0)], [Strided(0, 2), Shard(0)]], ids=str
)
def test_no_placement_changes_a_fingerprint_and_one_changed_element_does(placements: list[object]) -> None:
    whole = np.arange(70, dtype=np.float32).reshape(10, 7)

    def parts(change: int | None) -> list[Part]:
        every = tiles(whole.shape, (2, 2), placements, "w")  # type: ignore[arg-type]
        found = []
        for rank in range(4):
            mine = every.at(every.place == rank)
            array = np.zeros(whole.size, np.float32)
            for i in range(len(mine)):
                box = tuple(
                    slice(o, o + s)
                    for o, s in zip(mine.offsets[i].tolist(), mine.sizes[i].tolist(), strict=True)
                )
                view = np.lib.stride_tricks.as_strided(
                    array[int(mine.start[i]) :], mine.sizes[i].tolist(), (mine.strides[i] * 4).tolist()
                )
                view[...] = whole[box]
            if change == rank:
                array[int(mine.start[0])] += 1
            local = LocalTensor.of_tiles("w", "F32", mine, "w", DIGEST).fingerprinted(array.tobytes())
            assert local.fingerprint is not None
            part = Part(rank, f"rank-{rank:05}.safetensors", 4096, DIGEST, (local,))
            found.append(Part.read(part.write()))
        return found

    assert table(parts(None)).fingerprints == {"w": fingerprint(whole)}
    assert table(parts(0)).fingerprints != {"w": fingerprint(whole)}
