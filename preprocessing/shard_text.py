"""Text to token shards: tokenise, hold out a part, pack to rows, write Arrow files and a manifest.

    python preprocessing/shard_text.py --input text --tokenizer sentencepiece.bpe.model --out shards
    python preprocessing/shard_text.py --datasets wikipedia bookcorpus --tokenizer roberta-base --out english

`text` holds <lang>.jsonl[.gz], <lang>.txt[.gz], <lang>.parquet or folders <lang>/ of these. The second line is
RoBERTa-MEDIUM's data, streamed from the hub; `roberta-base` is the folder of that tokenizer. The work is in
ksub_ds/corpus/text/pipeline.py.
"""

import sys

from ksub_ds.common.errors import UserError
from ksub_ds.common.options import parse
from ksub_ds.corpus.text.pipeline import ShardText, shard_text


def main() -> None:
    """Run; a user's mistake is one line and exit code 2, Ctrl-C one line and 130."""
    try:
        shard_text(parse(ShardText, None, "preprocessing/shard_text.py"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; mend it, the same command continues", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
