"""Text filtered and deduplicated by datatrove, for `retnet data`.

    pip install 'datatrove[io,processing]' spacy
    python recipes/data/datatrove_clean.py RAW CLEAN --tasks 64 --workers 8
    retnet data CLEAN/text tokens/clean --tokenizer gpt2/tokenizer.json

RAW: a folder or URL of `.jsonl` (also compressed) with `text`. CLEAN: a folder or URL: text/ gets the documents that
stay, removed/ the others, logs/ the progress. Filters are the quality and repetition rules of Gopher (Rae et al. 2021,
arXiv 2112.11446). Near duplicates are found by MinHash (14 buckets of 8 hashes of 5-grams, datatrove's defaults); one
document of each group stays. The same command resumes an interrupted run: datatrove keeps a mark per finished task in
logs/. On Slurm or Ray, use datatrove's executors of those names in place of the local one.

RAW must be the same with the same number of tasks in every step: a document is known by its task and its place there.
"""

from __future__ import annotations

import argparse

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter


def steps(raw: str, clean: str, tasks: int) -> list[tuple[str, list, int]]:
    """The pipelines in their order: name, blocks and number of tasks."""
    config = MinhashConfig()

    def dropped(name: str) -> JsonlWriter:
        return JsonlWriter(f"{clean}/removed/{name}")

    return [
        (
            "filter",
            [
                JsonlReader(raw, text_key="text"),
                GopherRepetitionFilter(exclusion_writer=dropped("repetition")),
                GopherQualityFilter(exclusion_writer=dropped("quality")),
                JsonlWriter(f"{clean}/filtered"),
            ],
            tasks,
        ),
        (
            "signatures",
            [JsonlReader(f"{clean}/filtered"), MinhashDedupSignature(f"{clean}/minhash/signatures", config=config)],
            tasks,
        ),
        (
            "buckets",
            [MinhashDedupBuckets(f"{clean}/minhash/signatures", f"{clean}/minhash/buckets", config=config)],
            config.num_buckets,
        ),
        ("clusters", [MinhashDedupCluster(f"{clean}/minhash/buckets", f"{clean}/minhash/remove", config=config)], 1),
        (
            "text",
            [
                JsonlReader(f"{clean}/filtered"),
                MinhashDedupFilter(f"{clean}/minhash/remove", exclusion_writer=dropped("duplicates")),
                JsonlWriter(f"{clean}/text"),
            ],
            tasks,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("raw", metavar="RAW")
    parser.add_argument("clean", metavar="CLEAN")
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    for name, blocks, tasks in steps(given.raw, given.clean, given.tasks):
        logs = f"{given.clean}/logs/{name}"
        LocalPipelineExecutor(blocks, tasks=tasks, workers=min(given.workers, tasks), logging_dir=logs).run()


if __name__ == "__main__":
    main()
