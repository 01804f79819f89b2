"""Launch configurations: functions of the sizes alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hvae_kernels._triton.launch import cdiv, next_power_of_2

#: Above this many steps the chain gets a launch of its own, if several programs would repeat it: at 10 to 16 float64
#: instructions a step and feature, 64 steps in each of some 500 programs cost about what the launch does.
FUSED_STEPS = 64
#: A batch of at most this many elements a replica is one program's work (10 x 400 is): it would take a single
#: multiprocessor 2 to 3 us, less than a second launch.
SMALL_ELEMENTS = 8192
SMALL_FEATURES = 512
#: Rows are handed out so that there are at least this many programs, 32 for each of an H200's 132 multiprocessors:
#: several waves, so that the last one's idle tail is short.
MANY_PROGRAMS = 4224
#: Tiles a program: at least 4 to repay composing the map, at most 128 to bound the error of float32 column sums, and
#: between these as many as keep the partial sums to some 512 rows: reading them is latency, nothing else runs then.
FEWEST_TILES, MOST_TILES, MANY_CHUNKS = 4, 128, 512
#: The kernel that adds the partial sums keeps all features in one program up to this many partial rows x features;
#: beyond, its programs take 8 features each, one 32-byte sector of float32 and many rows at once.
FINISH_TOGETHER = 8192
FINISH_FEATURES = 8


@dataclass(frozen=True)
class Tiling:
    """Each program takes ``tiles`` tiles of ``block_rows x block_features``, one below the other."""

    block_rows: int
    block_features: int
    tiles: int
    chunks: int
    feature_blocks: int
    num_warps: int


def _block_features(features: int) -> int:
    """128 or 64, whichever pads less (400 is 7 x 64 or 4 x 128); fewer when there are fewer."""
    widest = min(next_power_of_2(features), 128)
    return min((widest, 64), key=lambda block: cdiv(features, block) * block) if features > 64 else widest


@functools.lru_cache(maxsize=1024)
def row_tiling(replicas: int, rows: int, features: int, elements: int) -> Tiling:
    """Tiles of ``elements`` (8 a thread keep enough bytes in flight; 4 where many accumulators want registers)."""
    block_features = _block_features(features)
    block_rows = min(elements // block_features, next_power_of_2(rows))
    feature_blocks = cdiv(features, block_features)
    row_tiles = cdiv(rows, block_rows)
    wanted = max(replicas * row_tiles * feature_blocks // MANY_PROGRAMS, row_tiles // MANY_CHUNKS)
    tiles = min(row_tiles, max(FEWEST_TILES, min(MOST_TILES, wanted)))
    return Tiling(block_rows, block_features, tiles, cdiv(row_tiles, tiles), feature_blocks, 4)


@functools.lru_cache(maxsize=1024)
def small_tiling(rows: int, features: int) -> Tiling | None:
    """One program a replica, which then also runs the chain backwards; ``None`` if the batch is too large for that."""
    if features > SMALL_FEATURES or rows * features > SMALL_ELEMENTS:
        return None
    block_features = next_power_of_2(features)
    block_rows = min(1024 // block_features, next_power_of_2(rows))
    num_warps = 8 if block_rows * block_features > 512 else 4  # 4 entries a thread, as the sums are float64 here
    return Tiling(block_rows, block_features, cdiv(rows, block_rows), 1, 1, num_warps)


@functools.lru_cache(maxsize=1024)
def finish_tiling(chunks: int, features: int) -> Tiling:
    """How to read ``chunks`` rows of partial sums: one program if they are few, else many narrow ones share them."""
    together = features <= SMALL_FEATURES and chunks * features <= FINISH_TOGETHER
    block_features = next_power_of_2(features) if together else min(FINISH_FEATURES, next_power_of_2(features))
    block_rows = max(1, min(1024 // block_features, next_power_of_2(chunks)))
    return Tiling(block_rows, block_features, cdiv(chunks, block_rows), 1, cdiv(features, block_features), 8)
