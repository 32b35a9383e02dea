"""Tokenising text: `retnet data` beside `datasets.map`, speed and peak memory.

    python benchmarks/bench_data.py TEXT --tokenizer FILE [--separator S] [--megabytes M] [--processes P]
                                    [--only NAME ...] [--csv FILE]

Both read the same jsonl (the first M megabytes of the text's documents, whole documents), with the same tokenizer.json,
in P processes, and write to disk: ours token shards, datasets its cache of int32 or int64 columns, in the way of its
documentation (a fast tokenizer of transformers on batches of 1000). "map" is the call to `map` alone; "whole" is the
process from start to end, imports and the reading of jsonl included, and so is ours. Memory is the highest sum of the
resident memory of all processes of a run, looked at every 20 ms; pages that several share count for each.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from runner import Point, append, table

MAP = """
import sys, time
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

source, tokenizer_file, processes, cache = sys.argv[1:]
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file)

def tokenize(batch):
    return tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)

if __name__ == "__main__":
    data = load_dataset("json", data_files=source, split="train", cache_dir=cache)
    began = time.perf_counter()
    data = data.map(tokenize, batched=True, num_proc=int(processes), remove_columns=data.column_names)
    print("seconds", time.perf_counter() - began)
    print("tokens", sum(map(len, data["input_ids"])))
"""


def write_jsonl(text: Path, separator: str, megabytes: float, path: Path) -> tuple[int, int]:
    """The first documents as jsonl; (bytes, documents)."""
    size = documents = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in text.read_text(encoding="utf-8").split(separator):
            if document.strip() and size < megabytes * 1e6:
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size, documents = size + len(document.encode()), documents + 1
    return size, documents


def run(words: list[str]) -> tuple[str, float, float]:
    """Output, seconds and peak MiB of a command and its descendants."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            family = [watched, *watched.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{words[:4]} ended with {process.returncode}: {output}")
    return output, seconds, peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--separator", default="\n\n\n")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["retnet", "datasets"])
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    points = []
    try:
        source = folder / "text.jsonl"
        size, documents = write_jsonl(arguments.text, arguments.separator, arguments.megabytes, source)
        case = f"{size / 1e6:.1f} MB, {documents} docs, {arguments.processes} proc"

        def add(name: str, what: str, seconds: float, mebibytes: float | None, note: str = "") -> None:
            note = f"{size / 1e6 / seconds:.2f} MB/s {note}"
            points.append(Point("data", case, name, what, 1e3 * seconds, extra_mebibytes=mebibytes, note=note))

        if "retnet" in arguments.only:
            shard_size = arguments.megabytes / (4 * arguments.processes)
            options = ["--workers", str(arguments.processes), "--shard-size", str(shard_size)]
            options += ["--tokenizer", arguments.tokenizer]
            words = [sys.executable, "-m", "retnet.cli", "data", str(source), str(folder / "out"), *options]
            _, seconds, mebibytes = run(words)
            manifest = json.loads((folder / "out/manifest.json").read_bytes())
            add("retnet", "whole", seconds, mebibytes, f"{manifest['tokens'] - manifest['documents']} tokens")
        if "datasets" in arguments.only:
            (folder / "map.py").write_text(MAP)
            words = [sys.executable, str(folder / "map.py"), str(source), arguments.tokenizer]
            output, seconds, mebibytes = run([*words, str(arguments.processes), str(folder / "cache")])
            found = dict(line.split() for line in output.splitlines())
            add("datasets", "map", float(found["seconds"]), None)
            add("datasets", "whole", seconds, mebibytes, f"{found['tokens']} tokens")
    finally:
        shutil.rmtree(folder)
    print(table(points))
    if arguments.csv:
        append(arguments.csv, points)


if __name__ == "__main__":
    main()
