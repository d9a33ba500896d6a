"""From index tensors to a BlockMask: the one file that knows FlexAttention's layout laws.

FlexAttention trusts its BlockMask. What it does not check, and what this file therefore holds to:

- The partial and the full list have the same shape and strides: one of the kernels reads both with the strides of the
  first. int32 tensors, indices ascending, at least one column wide, all rows at one distance: kernels take a row's
  address as (batch * heads + head) * rows + row times that. They may be views of one tensor, in part the same memory,
  but not made in the graph of the CPU's kernel, which names its arguments by the memory that they lie in.
- A block is in one list only (in both it counts twice), in the full list when nothing in it is masked.
- `seq_lengths` is always given, or a length that the block does not divide is rounded up.
- `compute_q_blocks=False`: the transposed lists serve the backward pass alone and cost time quadratic in blocks.
- The head dimension of the lists is Hq (or 1), never Hkv.
- `mask_mod` is a module-level function or closes over tensors: a captured Python number would be a new graph for
  every value, and a trivial mask_mod makes one backend drop the lists. It reads vectors by `item`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.attention.flex_attention import BlockMask, _mask_mod_signature

from flexprefill_fa.grid import positions
from flexprefill_fa.selection import BlockSelection

MaskMod = _mask_mod_signature


def item(vector: Tensor, index: Tensor) -> Tensor:
    """`vector[index]` of a captured vector, for an index that is within it.

    On the CPU without the vector's size in the kernel, where a plain index compares with it: FlexAttention's template
    garbles the names of sizes (`ks15`, where a name of its own is `ks1`), and the kernel does not compile. Which do
    depends on where in the caller's code the tensors come from.
    """
    if vector.device.type != "cpu":
        return vector[index]
    # Of the operators that index, the one that neither checks its index nor lets it count from the end.
    return torch.ops.aten._unsafe_masked_index(vector, index >= 0, [index], 0)


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The mask of an unpadded prompt without a cached prefix."""
    return q_idx >= kv_idx


def causal_at(position: tuple[Tensor, Tensor, Tensor]) -> MaskMod:
    """Causal mask with an offset and padding: `position` is what `positions` returns."""
    offset, start, end = position

    def padded_causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + item(offset, b) >= kv_idx) & (kv_idx >= item(start, b)) & (kv_idx < item(end, b))

    return padded_causal


def base_mask_mod(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None) -> MaskMod:
    """The cheapest mask_mod that is right for these lengths and this padding."""
    if needs_position(query, key, starts, lengths):
        return causal_at(positions(query, key, starts, lengths))
    return causal


def needs_position(query: Tensor, key: Tensor, starts: Tensor | None, lengths: Tensor | None) -> bool:
    """Whether the mask must know an offset or padding."""
    return starts is not None or lengths is not None or query.shape[2] != key.shape[2]


def both(first: MaskMod, second: Callable[..., Tensor]) -> MaskMod:
    """The intersection of two mask_mods."""

    def both_masks(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return first(b, h, q_idx, kv_idx) & second(b, h, q_idx, kv_idx)

    return both_masks


def looked_up(mask_mod: MaskMod, keep: Tensor, block_size: int) -> MaskMod:
    """`mask_mod` restricted to the kept blocks by a lookup in `keep`, bool `[B, Hq, nq, nk]`.

    Uncompiled `flex_attention` ignores the block lists and evaluates the mask_mod alone: with this one it still
    computes the same attention.
    """
    kept = _flat_lookup(keep) if keep.device.type == "cpu" else _lookup(keep)

    # Literal block sizes: a captured Python number would be a guard, a captured tensor a load for every pair.
    def selected_128(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & kept(b, h, q_idx // 128, kv_idx // 128)

    def selected_64(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return mask_mod(b, h, q_idx, kv_idx) & kept(b, h, q_idx // 64, kv_idx // 64)

    return selected_128 if block_size == 128 else selected_64


def _lookup(keep: Tensor) -> MaskMod:
    def kept(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return keep[b, h, row, column]

    return kept


def _flat_lookup(keep: Tensor) -> MaskMod:
    """`_lookup` whose kernel knows no sizes: it reads the strides from memory, see `item`."""
    flat, batch = keep.flatten(), keep.shape[0]
    # One more than the batch: a vector of one item would be a graph of its own.
    per_element, per_head, per_row = (
        torch.full((batch + 1,), stride, dtype=torch.int64, device=keep.device) for stride in keep.stride()[:3]
    )

    def kept(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        first = b * item(per_element, b) + h * item(per_head, b)
        return item(flat, first + row * item(per_row, b) + column)

    return kept


@torch.library.custom_op("flexprefill_fa::copied", mutates_args=())
def copied(indices: Tensor) -> Tensor:
    """A copy of the same strides: an operator, so that it is in memory of its own."""
    return indices.new_empty_strided(indices.shape, indices.stride()).copy_(indices)


@copied.register_fake
def _(indices: Tensor) -> Tensor:
    return indices.new_empty_strided(indices.shape, indices.stride())


def assemble(
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    *,
    block_size: int,
    mask_mod: MaskMod,
    q_len: int,
    kv_len: int,
) -> BlockMask:
    """A BlockMask of the four index tensors of a selection."""
    if kv_indices.device.type == "cpu" and is_dynamo_compiling():
        full_kv_indices = copied(full_kv_indices)
    return BlockMask.from_kv_blocks(
        kv_num_blocks,
        kv_indices,
        full_kv_num_blocks,
        full_kv_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
        compute_q_blocks=False,
    )


def check_layout(selection: BlockSelection) -> None:
    """Check a selection that did not come from our own operators against the layout laws.

    Raises:
        ValueError: if a tensor has another shape, dtype or memory layout than FlexAttention needs.
    """
    grid = selection.grid
    counts = {"kv_num_blocks": selection.kv_num_blocks, "full_kv_num_blocks": selection.full_kv_num_blocks}
    indices = {"kv_indices": selection.kv_indices, "full_kv_indices": selection.full_kv_indices}
    batch, heads = selection.kv_num_blocks.shape[:2]
    width = selection.kv_indices.shape[-1]
    if not 1 <= width <= grid.kv_blocks:
        raise ValueError(f"kv_indices must be 1 to {grid.kv_blocks} blocks wide, got {width}")
    row = selection.kv_indices.stride(2)
    for name, tensor in {**counts, **indices}.items():
        shape = (batch, heads, grid.q_blocks) + ((width,) if name in indices else ())
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}")
        rows = (heads * grid.q_blocks, grid.q_blocks, 1)
        strides = (*(number * row for number in rows), 1) if name in indices else rows
        if any(size > 1 and got != step for size, got, step in zip(shape, tensor.stride(), strides, strict=True)):
            raise ValueError(f"{name} must have strides {strides}, got {tensor.stride()}")


def to_block_mask(selection: BlockSelection, mask_mod: MaskMod) -> BlockMask:
    """The BlockMask of a selection."""
    check_layout(selection)
    return assemble(
        *selection.lists,
        block_size=selection.block_size,
        mask_mod=mask_mod,
        q_len=selection.q_len,
        kv_len=selection.kv_len,
    )
