"""Softmax attention of one new token of each sequence to its pages, with the bits of training.

A program takes one sequence and key head: the query heads that read it are rows of a tile of 64, the row layout of the
forward, so that the same matrix instructions add the same numbers in the same order (a tile of 16 rows does not).
How many pages there are is read on the device: no launch depends on it, so a CUDA graph replays the step.

B sequences, H query heads, K key heads, D head dim, M = 64 rows of the tile, C = 64 keys of a page.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cispo.kernels.chunks import CHUNK_LENGTH
from cispo.kernels.gpu.attention import KEY_ROWS, LOG2_E, absorb_tile, key_block, key_tile, page_tiles
from cispo.kernels.gpu.build import Build
from cispo.kernels.softmax_cpu import Pages


@triton.jit(do_not_specialize=["table_row"])
def _decode(
    q, q_row, k_tiles, v_tiles, table, table_row, position_B, out, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    key_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    row = tl.arange(0, ROWS)
    exists = row < GROUP
    columns = (key_head * GROUP + row)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    queries = tl.load(q + sequence * q_row + columns, mask=exists[:, None], other=0.0)
    position = tl.load(position_B + sequence).to(tl.int32)
    own_table = table + sequence * table_row
    visible_tiles = (position + 1) // KEY_ROWS
    tiles = position // KEY_ROWS + 1

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, DIM], tl.float32)
    block = key_block(own_table, 0, tiles, key_head, KEY_HEADS, True)
    for j in tl.range(0, visible_tiles, num_stages=STAGES):
        keys, values = key_tile(k_tiles, v_tiles, block, 0, key_head, j, DIM, True)
        block = key_block(own_table, j + 1, tiles, key_head, KEY_HEADS, True)
        maximum, total, attended = absorb_tile(queries, keys, values, row, maximum, total, attended, scale, False)
    for j in tl.range(visible_tiles, tiles, num_stages=1):
        keys, values = key_tile(k_tiles, v_tiles, block, 0, key_head, j, DIM, True)
        block = key_block(own_table, j + 1, tiles, key_head, KEY_HEADS, True)
        offset = position - j * KEY_ROWS
        values = tl.where((tl.arange(0, KEY_ROWS) <= offset)[:, None], values, 0.0)
        rows = tl.zeros([ROWS], tl.int32) + offset
        maximum, total, attended = absorb_tile(queries, keys, values, rows, maximum, total, attended, scale, True)

    attended = attended / total[:, None]
    to = out + sequence * (HEADS * DIM) + columns
    tl.store(to, attended.to(out.dtype.element_ty), mask=exists[:, None])


def _build(dim: int, num_stages: int) -> Build:
    types = {
        "q": "*bf16", "q_row": "i32", "k_tiles": f"tensordesc<bf16[{dim}, {CHUNK_LENGTH}]>",
        "v_tiles": f"tensordesc<bf16[{CHUNK_LENGTH}, {dim}]>", "table": "*i64", "table_row": "i32",
        "position_B": "*i64", "out": "*bf16", "scale": "fp32",
    }  # fmt: skip
    constants = {"HEADS": 16, "KEY_HEADS": 4, "DIM": dim, "ROWS": 64, "STAGES": num_stages}
    name = f"attention decode, D {dim}"
    return Build(name, _decode, types, constants, num_warps=4, num_stages=num_stages, has_products=True)


_DECODE: Mapping[int, Build] = {64: _build(64, num_stages=4), 128: _build(128, num_stages=4)}

BUILDS: list[Build] = list(_DECODE.values())


def decode(q_BX: Tensor, pages: Pages, heads: int, key_heads: int, position_B: Tensor) -> Tensor:
    """One rotated query a sequence, [B, H * D], against its pages up to position_B (int64), its own key among them.

    At most 64 query heads a key head. The table may be wider than the longest sequence; idle rows need one page that
    holds numbers at row 0. Returns [B, H * D] in the dtype of the queries. Raises ValueError for larger groups.
    """
    batch, columns = q_BX.shape
    dim = columns // heads
    if heads > key_heads * 64:
        raise ValueError(f"{heads} query heads on {key_heads} key heads: at most 64 a key head fit a tile of decode")
    build = _DECODE[dim]
    out = torch.empty(batch, columns, device=q_BX.device, dtype=q_BX.dtype)
    constants = {**build.constants, "HEADS": heads, "KEY_HEADS": key_heads}
    _decode[key_heads, batch](
        q_BX, q_BX.stride(0), *page_tiles(pages), pages.table_BJ, pages.table_BJ.stride(0), position_B, out,
        dim**-0.5 * LOG2_E, **constants, num_warps=build.num_warps, num_stages=build.num_stages,
    )  # fmt: skip
    return out
