"""Tensors in files, of which any region can be read alone: safetensors, and torch's .bin.

A StoredTensor knows in which files its pieces are. stored[0:10, 5:8] reads those rows and columns,
so a rank of a sharded model reads its own shard only, however many ranks wrote the files.
"""
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from configurator import BadInput, refuse_lfs_pointer

BLOCK = 2 ** 24         # elements copied at a time


class Piece(NamedTuple):
    """A tensor of a file, and its place in the whole."""
    path: Path
    name: str                           # in the file
    shape: tuple                        # in the file; leading dimensions of size 1 may be left out
    offset: tuple                       # in the whole, one number per dimension of the whole


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its files. Its pieces must cover it."""
    shape: tuple
    dtype: torch.dtype
    pieces: list                        # of Piece

    def __getitem__(self, region):
        """Read a region: a tuple of slices, each with start and stop, one per dimension."""
        return self.read(region)

    def read(self, region=None, dtype=None):
        """Return a region (None: all) as a tensor with memory of its own, in `dtype` or as
        stored."""
        if region is None:
            region = tuple(slice(0, n) for n in self.shape)
        sizes = [each.stop - each.start for each in region]
        result = torch.empty(sizes, dtype=dtype or self.dtype)
        for piece in self.pieces:
            for place, block in read_blocks(piece, region):
                result[place] = block
        return result


def read_blocks(piece, region):
    """Yield what a piece holds of a region, some rows at a time: (place in the region, tensor).

    The file is opened for each block, so that little of it stays mapped into memory.
    """
    inside, place = overlap(piece, region)
    if any(each.start >= each.stop for each in inside):
        return
    axis = len(piece.offset) - len(piece.shape)            # of the piece's rows in the whole
    if not piece.shape:
        yield place, read_slice(piece, inside)
        return
    rows, before = inside[axis], place[axis].start - inside[axis].start
    step = max(1, BLOCK // math.prod(each.stop - each.start for each in inside[axis + 1:]))
    for first in range(rows.start, rows.stop, step):
        end = min(first + step, rows.stop)
        there = (*place[:axis], slice(before + first, before + end), *place[axis + 1:])
        yield there, read_slice(piece, (slice(first, end), *inside[axis + 1:]))


def same_content(a, b):
    """Return whether two tensors of one piece each are equal."""
    region = tuple(slice(0, n) for n in a.shape)
    blocks = zip(read_blocks(a.pieces[0], region), read_blocks(b.pieces[0], region))
    return a.shape == b.shape and all(torch.equal(x, y) for (_, x), (_, y) in blocks)


def overlap(piece, region):
    """Return the part that a piece and a region share, as slices of the piece and of the region;
    slices that end before they start: none."""
    sizes = (1,) * (len(piece.offset) - len(piece.shape)) + piece.shape
    inside, place = [], []
    for wanted, offset, size in zip(region, piece.offset, sizes):
        first, end = max(wanted.start, offset), min(wanted.stop, offset + size)
        inside.append(slice(first - offset, end - offset))
        place.append(slice(first - wanted.start, end - wanted.start))
    return tuple(inside), tuple(place)


# ---- files

def read_slice(piece, slices):
    """Return a part of the tensor of a file; it is a view of the file, mapped into memory."""
    if piece.path.suffix == ".safetensors":
        with safe_open(piece.path, "pt") as file:
            return file.get_slice(piece.name)[slices]
    return load_bin(piece.path)[piece.name][slices]


def stored_tensors(path):
    """Return {name: StoredTensor} of a weight file. Raises BadInput if it is damaged."""
    refuse_lfs_pointer(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = {name: empty_slice(file.get_slice(name)) for name in file.keys()}
        else:
            found = {name: (tuple(tensor.shape), tensor.dtype)
                     for name, tensor in load_bin(path).items()}
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError,
            AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: not a complete file of tensors ({reason})") from None
    return {name: StoredTensor(shape, dtype, [Piece(path, name, shape, (0,) * len(shape))])
            for name, (shape, dtype) in found.items()}


def empty_slice(stored):
    """Return (shape, dtype) of a slice object of safetensors, whose names of dtypes are not
    torch's: an empty part of it has the dtype."""
    shape = tuple(stored.get_shape())
    return shape, stored[tuple(slice(0, 0) for _ in shape)].dtype


def load_bin(path):
    """Return the tensors of a torch .bin file, memory-mapped; other pickled objects are refused."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
