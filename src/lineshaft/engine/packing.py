"""Lays a model's weights out for the native kernels, once when an engine is made."""

from __future__ import annotations

import copy
from itertools import chain

from lineshaft.model.decoder import Decoder
from lineshaft.model.linear import Linear
from lineshaft.model.mla import MlaBlock
from lineshaft.model.scorer import Scorer
from lineshaft.ops.isa import library
from lineshaft.ops.packed import Packed, PackedHeads, packed_of


def pack(model: Decoder) -> None:
    """Replace every weight that the kernels take by its packed form, layer by layer, so that no two copies of all are in memory."""
    if library() is None:
        return
    dtype, taken = model.model.embed_tokens.weight.dtype, set()
    for module in model.modules():  # a block comes before its parts
        if isinstance(module, MlaBlock):  # its up-projection is never multiplied by as a whole (model/attend.py)
            module.kv_b_proj.pack_by_head(module.heads, module.nope, dtype)
            taken.add(module.kv_b_proj)
        elif isinstance(module, Linear) and module not in taken:
            module.pack(wide=module is model.lm_head)
        elif isinstance(module, Scorer):
            module.pack()
    if model.lm_head is None and (found := packed_of(Linear(0, 0).format, {"weight": model.model.embed_tokens.weight}, wide=True)):
        head = Linear(0, 0)
        head.in_features, head.out_features = model.config.hidden_size, model.config.vocab_size
        head.hold(found[0], {"packed": found[1]})
        model.lm_head = head


def leave_file(model: Decoder) -> None:
    """Copy what is not packed, so that nothing points into the checkpoint's mapping any more and the system takes its pages back.

    Not where layers stay as they are stored (a width that the kernels can't take, or no kernels): the mapping is the only copy of them,
    and may leave memory.
    """
    if not all(isinstance(linear.format, Packed | PackedHeads) for linear in model.linears().values()):
        return
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, Linear):  # its buffers are the packed weight, which is no file's, and lies in huge pages
            continue
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())  # not its data: a view would keep what it is a view of


def packed_copy(model: Decoder) -> Decoder:
    """The model with packed weights; the one given keeps its own, and shares what is not packed."""
    if library() is None:
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    own: Decoder = copy.deepcopy(model, shared)
    pack(own)
    return own
