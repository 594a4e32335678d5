"""Tokenising pairs as transformers does, the cache, and batches that waste next to nothing."""

from pathlib import Path

import numpy as np
import pytest

from ksub_ds.common.logging import get_logger
from ksub_ds.evaluate.data.rows import Rows
from ksub_ds.evaluate.finetune.encoding import EncodedRow, HuggingFacePairs, XlmrPairs, encode, load_encoder

TEXT = ["the old house falls", "a bird", "", "river stone green walks sings falls under over near slowly today " * 4]


@pytest.mark.parametrize("max_length", [8, 9, 20, 33, 128])
def test_pairs_are_those_of_transformers(tiny_model: Path, max_length: int) -> None:
    ours, theirs = load_encoder(str(tiny_model)), HuggingFacePairs(str(tiny_model))
    assert isinstance(ours, XlmrPairs)
    first = [a for a in TEXT for _ in TEXT]
    second = [b for _ in TEXT for b in TEXT]
    for pair in ((first, second), (first, None)):
        mine, others = (encoder.encode(*pair, max_length) for encoder in (ours, theirs))
        assert [(row.ids, row.cut) for row in mine] == [(row.ids, row.cut) for row in others]
        whole = ours.encode(*pair, 10_000)
        assert [row.cut for row in mine] == [len(row.ids) > max_length for row in whole]


def test_other_tokenizers_bring_their_pattern_and_types(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "bird", "sings"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    encoder = load_encoder(str(tmp_path / "bert"))
    encoded = encode(Rows(["a bird", "a"], ["sings", "bird sings"], [0.0, 1.0], "rows"), encoder, 16)
    batch = encoded.batch(np.array([0, 1]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert "attention_mask" not in batch  # of one length


def test_cache_is_used_checked_and_made_anew(tiny_model: Path, tmp_path: Path) -> None:
    rows = Rows(["a bird", "old house"], ["sings", "falls"], [0.0, 2.0], "rows")
    encoder = load_encoder(str(tiny_model))
    first = encode(rows, encoder, 16, tmp_path)
    (stored,) = (tmp_path / "encoded").iterdir()

    class Refuses(type(encoder)):  # type: ignore[misc]
        def encode(self, *arguments: object) -> list[EncodedRow]:
            raise AssertionError("tokenised again")

    refuses = Refuses.__new__(Refuses)
    refuses.__dict__.update(encoder.__dict__)
    assert (encode(rows, refuses, 16, tmp_path).ids == first.ids).all()
    for other in (
        Rows(rows.first, ["sings", "fall"], rows.labels, "rows"),
        Rows(*[rows.first] * 2, [0.0, 1.0], "rows"),
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            encode(other, refuses, 16, tmp_path)
    stored.write_bytes(stored.read_bytes()[:-3])
    assert (encode(rows, encoder, 16, tmp_path).ids == first.ids).all()


def test_rows_that_are_cut_are_counted(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file, save_file

    monkeypatch.setattr(get_logger(), "propagate", True)
    rows = Rows(TEXT, TEXT, [0.0] * 4, "FILE")
    encoder = load_encoder(str(tiny_model))
    for _ in range(2):  # the second time from the cache
        encoded = encode(rows, encoder, 20, tmp_path)
        assert encoded.cut == 1 and encoded.joined([encoded]).cut == 2
        told = caplog.text
        caplog.clear()
        assert "FILE: 1 of 4 rows are longer than 20 tokens (--max-length) and are cut" in told
    (stored,) = (tmp_path / "encoded").iterdir()
    arrays = load_file(stored)
    arrays.pop("cut")
    save_file(arrays, stored)  # as before it was counted
    assert encode(rows, encoder, 20, tmp_path).cut == 1
    assert encode(rows, encoder, 1_000, tmp_path).cut == 0


def test_a_batch_holds_its_rows(tiny_model: Path) -> None:
    rows = Rows(TEXT, TEXT[::-1], [0.0, 1.0, 2.0, 0.0], "rows")
    encoder = load_encoder(str(tiny_model))
    encoded = encode(rows, encoder, 40)
    made = encoder.encode(rows.first, rows.second, 40)
    joined = encoded.joined([encoded])
    batch = joined.batch(np.array([3, 0, 5]))
    for index, row in enumerate((3, 0, 1)):
        ids = made[row].ids
        assert batch["input_ids"][index].tolist() == ids + [encoded.pad_id] * (batch["input_ids"].shape[1] - len(ids))
        assert batch["attention_mask"][index].sum() == len(ids)
