"""Argument structs of the kernels, and sizes that kernels share with their host side."""

from __future__ import annotations

import numpy as np

from bidm_cli.packed.cpu.runtime.args import OPTIONAL, args_dtype

PACK_ARGS = args_dtype(
    ("x", np.int64),  # float32 [images, height, width, split]
    ("second", OPTIONAL),  # float32 [images, height, width, channels - split]: the other channels
    ("split", np.int64),  # channels where there is nothing in ``second``
    ("images", np.int64),
    ("height", np.int64),
    ("width", np.int64),
    ("channels", np.int64),
    ("repeat", np.int64),  # words and sums of a pixel fill a square of repeat x repeat
    ("limits", OPTIONAL),  # float32 [32 * words]: -tau; +inf for surplus channels. Absent without bits
    ("bits", OPTIONAL),  # ConvPlan.bits, within its border
    ("word_bytes", OPTIONAL),  # of 32 bits: 4, or 32 with a byte for each
    ("pixel_bytes", OPTIONAL),  # of one pixel's bits, and of one plane
    ("plane_bytes", OPTIONAL),
    ("planes", OPTIONAL),
    ("plane_offsets", OPTIONAL),  # float32 [planes - 1, 32 * words]: delta
    ("words", np.int64),
    ("padded_height", np.int64),
    ("padded_width", np.int64),
    ("top", OPTIONAL),  # pixels of the border
    ("left", OPTIONAL),
    ("sums", OPTIONAL),  # float32 [images, padded height, padded width]: sum of |v| / divisor
    ("factors", OPTIONAL),  # float32 [images, 32 * words]: of a norm, by the kernel's form
    ("offsets", OPTIONAL),  # the same
    ("values", OPTIONAL),  # float32 [images, map_rows, map_columns, channels]
    ("map_rows", np.int64),  # positions of the shortcut map
    ("map_columns", np.int64),
    ("pool_height", np.int64),  # pixels averaged per position; the last ones are cut by the border
    ("pool_width", np.int64),
    ("pools", np.int64),  # 1 where positions have more than one pixel
    ("block", np.int64),  # positions per item
    ("divisor", np.float32),
)

PACK_FORMS = ("plain", "normed", "normed_silu", "rms", "rms_silu")
"""Forms of the pack kernel: the norm and SiLU before packing."""

CONV_ARGS = args_dtype(
    ("bits", np.int64),  # as in PACK_ARGS
    ("pixel_bytes", np.int64),  # the same
    ("plane_bytes", np.int64),
    ("planes", np.int64),
    ("plane_scales", OPTIONAL),  # float32 [planes - 1]: g
    ("weights", np.int64),  # CpuWeights.words
    ("windows", OPTIONAL),  # for a matrix unit: room for copies, bytes [threads, MATRIX_TILES, window_bytes]
    ("window_bytes", OPTIONAL),  # of a tile's windows
    ("row_tiles", OPTIONAL),  # tiles per row of the image; 0 where they are not bound to rows
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
    ("groups", np.int64),  # filter groups: ceil(out_channels / filters per tile)
    ("block", np.int64),  # pixels per item, at most CONV_BLOCK / planes and what PAIRED_BYTES holds; or tiles
    ("group_step", np.int64),  # filter groups per item
    ("row_class", np.int64),  # int32 [out_height]: index of the set of kernel rows inside the image
    ("column_class", np.int64),  # int32 [out_width]: the same for columns
    ("column_classes", np.int64),
    ("corrections", np.int64),  # int32 [row classes * column classes, correction_pitch]
    ("correction_pitch", np.int64),  # groups * filters per tile
    ("sums", OPTIONAL),  # as in PACK_ARGS; absent without a scale map
    ("scale_filter", OPTIONAL),  # float32 [rows, columns]
    ("weight_scale", np.int64),  # float32 [groups * filters per tile]
    ("bias", np.int64),  # the same
    ("shortcut", OPTIONAL),  # float32 [images, map_rows, map_columns, shortcut_split]
    ("second_shortcut", OPTIONAL),  # the same, its channels from shortcut_split on
    ("shortcut_split", np.int64),  # shortcut_channels where there is nothing in second_shortcut
    ("shortcut_channels", np.int64),
    ("map_rows", np.int64),  # positions of the shortcut map
    ("map_columns", np.int64),
    ("map_y", np.int64),  # int32 [out_height], [out_width]: the position that an output pixel reads
    ("map_x", np.int64),
    ("offset", OPTIONAL),  # float32 [images, out_channels], added to each pixel of an image
    ("residual", OPTIONAL),  # float32, added, laid out as out
    ("out", np.int64),  # float32 [images, out_height, out_width, out_channels]
    ("shortcut_scale", np.float32),
)

CONV_BLOCK = 64
"""Most output pixels x planes of one item."""

MATRIX_TILES = 4
"""Tiles of an item, each of one plane, that there is room for."""

PAIRED_BYTES = 1 << 16
"""Room for an item's windows in pairs, 8 bytes for a word of each."""

NORM_ARGS = args_dtype(
    ("x", np.int64),  # float32 [images, pixels, split]
    ("second", OPTIONAL),  # float32 [images, pixels, channels - split]: the other channels
    ("split", np.int64),
    ("images", np.int64),
    ("pixels", np.int64),
    ("channels", np.int64),
    ("groups", np.int64),
    ("block", np.int64),  # pixels per block
    ("blocks", np.int64),  # per image
    ("sums", np.int64),  # float32 [images, blocks, 2, channels padded to 32]
    ("finished", np.int64),  # int64 [images], blocks done; 0 at the start and at the end
    ("gamma", OPTIONAL),  # float32 [channels]
    ("beta", OPTIONAL),
    ("scale", OPTIONAL),  # FiLM: float32 [images, channels], rows film_pitch floats apart
    ("shift", OPTIONAL),
    ("film_pitch", OPTIONAL),
    ("factors", np.int64),  # result, float32 [images, channels padded to 32]
    ("offsets", np.int64),
    ("epsilon", np.float64),
)

NORM_BLOCK = 128
"""Pixels per item of the norm kernel."""

_ATTENTION_INPUTS = (
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
"""First fields of the arguments of all kinds of attention."""

_ATTENTION_FIELDS = (
    *_ATTENTION_INPUTS,
    ("values", np.int64),  # float32 [images * heads, panels of values, keys, columns per panel]
    ("scores", np.int64),  # float32 [threads, rows of an item, score pitch]
    ("score_pitch", np.int64),
    ("padded_keys", np.int64),
    ("padded_values", np.int64),
)
"""First fields of the arguments of kinds of attention that hold all scores of a few queries."""

ATTENTION_ARGS = args_dtype(
    *_ATTENTION_FIELDS,
    ("columns", np.int64),  # float32 [images * heads, panels of keys, padded width, keys per panel]
    ("padded_width", np.int64),
    ("exponent", np.float32),  # scale * log2(e)
    ("tiles", np.int64),  # of queries per item
)

MOST_TILES = 8
"""Most tiles of queries per item of attention with float scores."""

MATRIX_ATTENTION_ARGS = args_dtype(
    *_ATTENTION_INPUTS,
    # Panels of bfloat16, see codegen/amx_floats.py, of 32 keys, 32 columns of values, 32 queries:
    ("key_panels", np.int64),  # [images * heads, panels, steps of 32 of the width, parts, 2, 16, 32]
    ("value_panels", np.int64),  # [images * heads, panels, steps of 32 keys, parts, 2, 16, 32]
    ("query_panels", np.int64),  # [threads, blocks, steps of 32 of the width, parts, 2, 16, 32]
    ("products", np.int64),  # float32 [threads, blocks, panels of values, 32, 32]
    ("tasks", np.int64),  # int64 [threads, panels of values + MATRIX_PANELS, 5]
    ("blocks", np.int64),  # of 32 queries per item, at most MOST_BLOCKS
    ("exponent", np.float32),  # scale * log2(e)
)

MATRIX_PANELS = 4
"""Panels of 32 keys whose scores stay in the first-level cache."""

MOST_BLOCKS = 8
"""Most blocks of 32 queries per item of attention on a matrix unit."""

BINARY_ATTENTION_ARGS = args_dtype(
    *_ATTENTION_FIELDS,
    ("words", np.int64),  # per query or key
    ("key_words", np.int64),  # int32 [images * heads, panels of keys, words, keys per panel]
    ("key_means", np.int64),  # float32 [images * heads, padded keys]
    ("query_words", np.int64),  # int32 [threads, tile rows, words]
    ("head_factors", np.int64),  # float32 [heads]: |gamma| scale log2(e)
)

OUTPUTS, INPUTS = 4, 6
"""Edges of Winograd's tile of outputs, and of the inputs that it depends on."""

POINTS = INPUTS * INPUTS

WINOGRAD_TILES = 8
"""Winograd's tiles per item, in rows of the product's tile: 2 to 16 were about as fast on a machine with
AVX2."""

WINOGRAD_WEIGHTS_ARGS = args_dtype(
    ("weights", np.int64),  # float32 [out_channels, 9, channels]
    ("transformed", np.int64),  # result, float32 [36, panels, channels, wide]
    ("point", np.int64),  # floats from one of the 36 to the next
    ("channels", np.int64),
    ("out_channels", np.int64),
)

WINOGRAD_ARGS = args_dtype(
    ("x", np.int64),  # float32 [images, height / repeat, width / repeat, channels]
    ("zeros", np.int64),  # float32 [channels]: a pixel outside the image
    ("weights", np.int64),  # float32 [36, panels, channels, wide]
    ("point", np.int64),  # floats from one of the 36 to the next
    ("bias", OPTIONAL),  # float32 [out_channels]
    ("residual", OPTIONAL),  # float32, as out
    ("out", np.int64),  # float32 [images, height, width, out_channels]
    ("images", np.int64),
    ("height", np.int64),
    ("width", np.int64),
    ("repeat", np.int64),  # pixels of x per edge: nearest neighbour upsampling
    ("channels", np.int64),
    ("out_channels", np.int64),
    ("inputs", np.int64),  # float32 [threads, 36, tiles per item, channels]
    ("products", np.int64),  # float32 [threads, 36, tiles per item, out_channels]
)

BLEND_ARGS = args_dtype(
    ("new", np.int64),  # float32 [images, length]
    ("old", np.int64),  # the same
    ("betas", np.int64),  # float32, one per image, beta_step floats apart
    ("beta_step", np.int64),
    ("out", np.int64),  # as new; may be new or old
    ("images", np.int64),
    ("length", np.int64),
    ("block", np.int64),  # elements per item, a multiple of 32
)
