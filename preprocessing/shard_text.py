"""Text to token shards: tokenise, hold out a part, pack to rows, write Arrow files and a manifest.

    python preprocessing/shard_text.py --input text --tokenizer sentencepiece.bpe.model --out shards
    python preprocessing/shard_text.py --datasets wikipedia bookcorpus --tokenizer roberta-base --out english

`text` holds <lang>.jsonl, <lang>.json, <lang>.txt, <lang>.parquet, <lang>.arrow, any of them compressed (.gz .xz .zst
.bz2), or folders <lang>/ of these. --text-column says which key or column holds the text, where it is not "text";
--line-documents that each line of a .txt is a document. The second line is RoBERTa-MEDIUM's data, streamed from the
hub; `roberta-base` is the folder of that tokenizer. --parallel adds rows of translations, from <l1>-<l2>.jsonl. The
work is in ksub_ds/corpus/text/pipeline.py.

Each text counts once: hidden names, copies, compressed forms of one file and files named after a held-out split are
left out and counted (--splits takes the last). The last lines say what is left out whole; --strict makes that an error.
docs/data.md has the rules, and those for names of languages (rus_Cyrl is ru).
"""

import sys

from ksub_ds.common.exit_codes import run_main
from ksub_ds.common.options import parse
from ksub_ds.corpus.text.pipeline import ShardText, shard_text


def main() -> None:
    """Parse the command line and make the shards."""
    shard_text(parse(ShardText, None, "preprocessing/shard_text.py"))


if __name__ == "__main__":
    sys.exit(run_main(main))
