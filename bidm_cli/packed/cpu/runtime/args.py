"""What kernels are told: one record a call, addresses and sizes side by side.

A kernel takes the address of its record and nothing else, which keeps a call from Python cheap: a record is
filled in when a layer first sees a shape; later calls only renew the addresses of input and output.
Addresses are int64 and 0 where a part is absent. Sizes count elements, not bytes, unless named so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_HEADER = (
    ("counter", np.int64),  # next item, shared by the threads
    ("workers", np.int64),  # threads that found work
    ("arrivals", np.int64),  # threads that took a workspace of their own, in attention
    ("entered", np.int64),  # threads that a program let in, and those that came back
    ("returned", np.int64),
)
"""See :class:`bidm_cli.packed.cpu.runtime.threads.Header`. All 0 at the start."""

PACK_JOB = np.dtype(
    [
        *_HEADER,
        ("x", np.int64),  # float32 [images, height, width, split]
        ("second", np.int64),  # float32 [images, height, width, channels - split]: the other channels
        ("split", np.int64),  # channels where there is nothing in ``second``
        ("images", np.int64),
        ("height", np.int64),
        ("width", np.int64),
        ("channels", np.int64),
        ("repeat", np.int64),  # words and sums of a pixel fill a square this wide
        ("limits", np.int64),  # float32 [32 * words]: -tau; +inf for surplus channels
        ("bits", np.int64),  # int32 [images, padded height, padded width, words] or 0
        ("words", np.int64),
        ("padded_height", np.int64),
        ("padded_width", np.int64),
        ("top", np.int64),
        ("left", np.int64),
        ("sums", np.int64),  # float32 [images, padded height, padded width]: sum of |v| / divisor, or 0
        ("factors", np.int64),  # float32 [images, 32 * words]: of a norm, by the kernel's form
        ("offsets", np.int64),  # the same
        ("values", np.int64),  # float32 [images, cell_rows, cell_columns, channels], or 0
        ("cell_rows", np.int64),
        ("cell_columns", np.int64),
        ("cell_height", np.int64),  # pixels of a cell; the last ones are cut by the border
        ("cell_width", np.int64),
        ("pools", np.int64),  # whether cells have more than one pixel
        ("block", np.int64),  # cells a thread takes at a time
        ("divisor", np.float32),
    ],
    align=True,
)

CONV_JOB = np.dtype(
    [
        *_HEADER,
        ("bits", np.int64),  # as in PACK_JOB
        ("weights", np.int64),  # int32 [filter groups, rows * run, filters a tile]
        ("images", np.int64),
        ("padded_height", np.int64),
        ("padded_width", np.int64),
        ("words", np.int64),
        ("rows", np.int64),  # kernel height
        ("columns", np.int64),  # kernel width
        ("stride_y", np.int64),
        ("stride_x", np.int64),
        ("out_height", np.int64),
        ("out_width", np.int64),
        ("out_channels", np.int64),
        ("groups", np.int64),  # filter groups: ceil(out_channels / filters a tile)
        ("block", np.int64),  # pixels of an item, at most BLOCK
        ("group_step", np.int64),  # filter groups of an item
        ("row_class", np.int64),  # int32 [out_height]: which kernel rows are inside the image
        ("column_class", np.int64),  # int32 [out_width]: the same for columns
        ("column_classes", np.int64),
        ("corrections", np.int64),  # int32 [row classes * column classes, correction_pitch]
        ("correction_pitch", np.int64),  # groups * filters a tile
        ("sums", np.int64),  # as in PACK_JOB; 0 without a scale map
        ("scale_filter", np.int64),  # float32 [rows, columns]
        ("weight_scale", np.int64),  # float32 [groups * filters a tile]
        ("bias", np.int64),  # the same
        ("shortcut", np.int64),  # float32 [images, cell_rows, cell_columns, shortcut_split] or 0
        ("second_shortcut", np.int64),  # the same, its channels from shortcut_split on
        ("shortcut_split", np.int64),  # shortcut_channels where there is nothing in second_shortcut
        ("shortcut_channels", np.int64),
        ("cell_rows", np.int64),
        ("cell_columns", np.int64),
        ("cell_y", np.int64),  # int32 [out_height], [out_width]: the cell that an output pixel reads
        ("cell_x", np.int64),
        ("offset", np.int64),  # float32 [images, out_channels], added to each pixel of an image, or 0
        ("residual", np.int64),  # float32, added, laid out as out, or 0
        ("out", np.int64),  # float32 [images, out_height, out_width, out_channels]
        ("shortcut_scale", np.float32),
    ],
    align=True,
)

NORM_JOB = np.dtype(
    [
        *_HEADER,
        ("x", np.int64),  # float32 [images, pixels, split]
        ("second", np.int64),  # as in PACK_JOB
        ("split", np.int64),
        ("images", np.int64),
        ("pixels", np.int64),
        ("channels", np.int64),
        ("groups", np.int64),
        ("block", np.int64),  # pixels of a block
        ("blocks", np.int64),  # of an image
        ("sums", np.int64),  # float32 [images, blocks, 2, channels padded to 32]
        ("finished", np.int64),  # int64 [images], blocks done; 0 at the start and at the end
        ("gamma", np.int64),  # float32 [channels] or 0
        ("beta", np.int64),
        ("scale", np.int64),  # FiLM: float32 [images, channels], rows film_pitch floats apart, or 0
        ("shift", np.int64),
        ("film_pitch", np.int64),
        ("factors", np.int64),  # result, float32 [images, channels padded to 32]
        ("offsets", np.int64),
        ("epsilon", np.float64),
    ],
    align=True,
)

MIX_JOB = np.dtype(
    [
        *_HEADER,
        ("new", np.int64),  # float32 [images, length]
        ("old", np.int64),  # the same
        ("betas", np.int64),  # float32, an image's is beta_step floats after the one before
        ("beta_step", np.int64),
        ("out", np.int64),  # as new; may be new or old
        ("images", np.int64),
        ("length", np.int64),
        ("block", np.int64),  # elements of an item, a multiple of 32
    ],
    align=True,
)

PROGRAM_JOB = np.dtype(
    [
        *_HEADER,
        ("current", np.int64),  # the item that threads are at; 0 at the start
        ("items", np.int64),  # int64 [count, 3]: address of a kernel, of its job, most threads in it
        ("count", np.int64),
        ("give_way", np.int64),  # address of usleep or 0
    ],
    align=True,
)

ARRIVALS, ENTERED, RETURNED = (
    8 * [name for name, _ in _HEADER].index(part) for part in ("arrivals", "entered", "returned")
)
"""Where these stand in a job, in bytes."""

HEADER_FIELDS = len(_HEADER)

BLOCK = 64
"""Most output pixels of one item of a convolution."""

MOST_PIXELS = 32
"""Most pixels of a tile of the inner loop."""

ATTENTION_FIELDS = (
    *_HEADER,
    ("q", np.int64),  # float32, strides below; the width is contiguous
    ("k", np.int64),
    ("v", np.int64),
    ("out", np.int64),
    ("images", np.int64),
    ("heads", np.int64),
    ("queries", np.int64),
    ("keys", np.int64),
    ("width", np.int64),  # of queries and keys
    ("value_width", np.int64),
    *((f"{name}_{axis}", np.int64) for name in ("q", "k", "v", "out") for axis in ("image", "head", "row")),
)
"""What jobs of both attentions begin with."""

ATTENTION_JOB = np.dtype(
    [
        *ATTENTION_FIELDS,
        ("columns", np.int64),  # float32 [images * heads, panels of keys, padded width, keys of a panel]
        ("values", np.int64),  # float32 [images * heads, panels of values, keys, columns of a panel]
        ("scores", np.int64),  # float32 [threads, tile rows, score pitch]
        ("score_pitch", np.int64),
        ("padded_width", np.int64),
        ("padded_keys", np.int64),
        ("padded_values", np.int64),
        ("exponent", np.float32),  # scale * log2(e)
    ],
    align=True,
)


def record(kind: np.dtype, values: Mapping[str, Any]) -> np.ndarray:
    """One record (an array of one) with these values and zeros elsewhere."""
    job = np.zeros(1, kind)
    for name, value in values.items():
        job[name] = value
    return job
