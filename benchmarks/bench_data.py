"""Speed and peak memory of tokenising text: `retnet data` and `datasets.map`.

    python benchmarks/bench_data.py TEXT --tokenizer FILE [--separator S] [--megabytes M] [--processes P]
                                    [--only NAME ...] [--csv FILE]

Both read the same jsonl file (whole documents, the first M megabytes of the text) with the same tokenizer.json in P
processes, and write to disk: ours writes token shards, datasets writes its cache of int32 or int64 columns. datasets
is used as its documentation shows, with a fast transformers tokenizer on batches of 1000. "map" is the call to `map`
alone. "whole" is the process from start to end, including imports and reading jsonl. Memory is the peak of the summed
resident memory of all processes of a run, sampled every 20 ms; shared pages count once per process.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from runner import Point, arguments, report

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
    """Write the first documents as jsonl; (bytes, number of documents)."""
    size = documents = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in text.read_text(encoding="utf-8").split(separator):
            if document.strip() and size < megabytes * 1e6:
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                size, documents = size + len(document.encode()), documents + 1
    return size, documents


def run(words: list[str]) -> tuple[str, float, int]:
    """(output, seconds, peak bytes) of a command and its child processes."""
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
    return output, seconds, peak


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--separator", default="\n\n\n", help="between documents of TEXT")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["retnet", "datasets"])
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    points = []
    try:
        source = folder / "text.jsonl"
        size, documents = write_jsonl(options.text, options.separator, options.megabytes, source)
        case = f"{size / 1e6:.1f} MB, {documents} docs, {options.processes} proc"

        def add(name: str, what: str, seconds: float, peak: int | None, note: str = "") -> None:
            note = f"{size / 1e6 / seconds:.2f} MB/s {note}"
            points.append(Point("data", case, name, what, 1e3 * seconds, extra_bytes=peak, note=note))

        if "retnet" in options.only:
            shard_size = options.megabytes / (4 * options.processes)
            words = [sys.executable, "-m", "retnet.cli", "data", str(source), str(folder / "out")]
            words += ["--workers", str(options.processes), "--shard-size", str(shard_size)]
            _, seconds, peak = run([*words, "--tokenizer", options.tokenizer])
            manifest = json.loads((folder / "out/manifest.json").read_bytes())
            add("retnet", "whole", seconds, peak, f"{manifest['tokens'] - manifest['documents']} tokens")
        if "datasets" in options.only:
            (folder / "map.py").write_text(MAP)
            words = [sys.executable, str(folder / "map.py"), str(source), options.tokenizer]
            output, seconds, peak = run([*words, str(options.processes), str(folder / "cache")])
            found = dict(line.split() for line in output.splitlines())
            add("datasets", "map", float(found["seconds"]), None)
            add("datasets", "whole", seconds, peak, f"{found['tokens']} tokens")
    finally:
        shutil.rmtree(folder)
    report(points, options.csv)


if __name__ == "__main__":
    main()
