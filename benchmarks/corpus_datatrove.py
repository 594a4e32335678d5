"""The other side of benchmarks/corpus.py: the same stages built from datatrove, in an environment that has it.

    python benchmarks/corpus_datatrove.py WET_FOLDER WORK_FOLDER tokenizer.json MIN_LENGTH

Reads WET files, drops every further copy of a paragraph (a line), drops short pages, tokenises. Prints one line of
JSON: pages read, processor seconds by stage. Needs `pip install "datatrove[io,processing]"`; nothing of ksub_ds.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import SentenceDedupFilter, SentenceDedupSignature, SentenceFindDedups
from datatrove.pipeline.dedup.sentence_dedup import SentDedupConfig
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main() -> None:
    wet, work, tokenizer, min_length = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    # Lines instead of sentences, one at a time, and no second look at a page that lost some: as CCNet's paragraphs.
    config = SentDedupConfig(n_sentences=1, split_sentences=False, min_doc_words=0, min_num_sentences=0)
    hashes, copies, tokens = (str(work / name) for name in ("hashes", "copies", "tokens"))

    def reader() -> WarcReader:
        return WarcReader(wet, glob_pattern="*.warc.wet.gz")

    stages = {
        "read and hash": [reader(), SentenceDedupSignature(hashes, config=config)],
        "find duplicates": [SentenceFindDedups(hashes, copies, config=config)],
        "read, filter and tokenise": [
            reader(),
            SentenceDedupFilter(copies, config=config),
            LambdaFilter(lambda page: len(page.text) >= min_length),
            DocumentTokenizer(tokens, tokenizer, shuffle_documents=False),
        ],
    }
    seconds, pages = {}, 0
    for name, pipeline in stages.items():
        start = time.process_time()
        stats = LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(work / "logs" / name)).run()
        seconds[name] = time.process_time() - start
        pages = pages or int(stats.stats[0].stats["documents"].total)
    print(json.dumps({"documents": pages, "seconds": seconds}))


if __name__ == "__main__":
    main()
