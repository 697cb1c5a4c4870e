"""What a model's parameters are called here and in the files of transformers and nanoGPT; what is transposed there."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A parameter here and in the files, which store matrices as their framework multiplies them."""

    ours: str
    theirs: str  # in transformers' and nanoGPT's files alike
    shape: str  # here: T is block_size, F = 4 * D
    conv1d: bool = False  # transposed in transformers' files, whose Conv1D has (in, out)
    linear: bool = False  # transposed in nanoGPT's files, where torch's Linear has (out, in)


# All that is known about layouts. `*` is a layer's number. Which transposition applies follows from the kind of file,
# never from a shape: attn.c_proj is square.
LAYOUT = (
    Row("wte.embedding", "wte.weight", "V D"),
    Row("wpe.embedding", "wpe.weight", "T D"),
    Row("h.*.ln_1.scale", "h.*.ln_1.weight", "D"),
    Row("h.*.ln_1.bias", "h.*.ln_1.bias", "D"),
    Row("h.*.attn.c_attn.kernel", "h.*.attn.c_attn.weight", "D 3D", linear=True),
    Row("h.*.attn.c_attn.bias", "h.*.attn.c_attn.bias", "3D"),
    Row("h.*.attn.c_proj.kernel", "h.*.attn.c_proj.weight", "D D", linear=True),
    Row("h.*.attn.c_proj.bias", "h.*.attn.c_proj.bias", "D"),
    Row("h.*.ln_2.scale", "h.*.ln_2.weight", "D"),
    Row("h.*.ln_2.bias", "h.*.ln_2.bias", "D"),
    Row("h.*.mlp.c_fc.kernel", "h.*.mlp.c_fc.weight", "D F", linear=True),
    Row("h.*.mlp.c_fc.bias", "h.*.mlp.c_fc.bias", "F"),
    Row("h.*.mlp.c_proj.kernel", "h.*.mlp.c_proj.weight", "D F", conv1d=True),
    Row("h.*.mlp.c_proj.bias", "h.*.mlp.c_proj.bias", "D"),
    Row("ln_f.scale", "ln_f.weight", "D"),
    Row("ln_f.bias", "ln_f.bias", "D"),
    Row("lm_head.embedding", "lm_head.weight", "V D"),
)
HEAD = "lm_head.weight"  # files of a tied head have it or not; here it is wte itself
PREFIX = re.compile(r"((_orig_mod|module)\.)*(transformer\.)?")  # torch.compile's, DDP's, that of the model with a head
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constants that older files have beside the weights


class Entry(NamedTuple):
    """A row of the table for one layer of one model."""

    ours: str
    theirs: str
    shape: tuple[int, ...]  # here
    conv1d: bool
    linear: bool


def entries(model: dict[str, Any], bias: bool, tied_head: bool = True) -> Iterator[Entry]:
    """Every parameter of a model (a dict of GPTConfig's fields), with or without biases and a head of its own."""
    D = model["n_embd"]
    sizes = {"V": model["vocab_size"], "T": model["block_size"], "D": D, "3D": 3 * D, "F": 4 * D}
    for ours, theirs, letters, conv1d, linear in LAYOUT:
        if (ours.endswith(".bias") and not bias) or (theirs == HEAD and tied_head):
            continue
        shape = tuple(sizes[letter] for letter in letters.split())
        for layer in map(str, range(model["n_layer"] if "*" in ours else 1)):
            yield Entry(ours.replace("*", layer), theirs.replace("*", layer), shape, conv1d, linear)
