"""Quality of stacks with equal parameters: one script, one table, all models on the same tokens in the same order.

    retnet data ... out/tokens/train (and valid, test, books; see docs/do/train.md)
    python recipes/quality.py pack --train out/tokens/train --valid ... --test ... --books ... --to out/packed
    python recipes/quality.py run gated-conv:muon:4e-3:0 llama:muon:4e-3:0 --data out/packed --out out/quality
    python recipes/quality.py queue arms.txt --data out/packed --out out/quality --gpu 0 --deadline 500
    python recipes/quality.py table out/quality
    python recipes/quality.py plot out/quality --png out/quality.png
    python recipes/quality.py run retnet:adamw:3e-3:0 --tiny --out out/tiny                     CPU, seconds

An arm is `stack:optimizer:rate:seed[:steps]` (`quality_stacks`, `quality_train`). The seed changes the weights, never
the order of the rows. Rows are 2048 consecutive tokens of the joined documents, 32 per step. A finalist (`--final`, or
`final` behind an arm in a queue) is also measured on test text, books, long contexts and repeats, and decodes.

`queue` takes the arms of a file in their order. Processes on several GPUs may share the file and the folder. It ends
when no arm is left, or when the next one would not be done by the deadline.
"""

import argparse
import json
import os
import time
from pathlib import Path

import quality_report
from quality_rows import load_rows, read_queue
from quality_stacks import SHAPES
from quality_train import Arm


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    pack = verbs.add_parser("pack", help="write token streams from folders of `retnet data`")
    for name in ("train", "valid", "test", "books"):
        pack.add_argument(f"--{name}", type=Path, required=True)
    pack.add_argument("--to", type=Path, default=Path("out/packed"))
    pack.add_argument("--part-bytes", type=int, default=40_000_000, help="of a compressed part, at most")
    run = verbs.add_parser("run", help="train and measure arms")
    run.add_argument("arms", nargs="+", metavar="ARM")
    run.add_argument("--final", action="store_true", help="measure as finalists")
    queue = verbs.add_parser("queue", help="train and measure the arms of a file that are not done")
    queue.add_argument("file", type=Path)
    for verb in (run, queue):
        verb.add_argument("--data", type=Path, default=Path("out/packed"))
        verb.add_argument("--out", type=Path, default=Path("out/quality"))
        verb.add_argument("--gpu", type=int, default=None, help="number of the GPU")
        verb.add_argument("--steps", type=int, default=None, help="of arms that do not say (default: 480; tiny: 20)")
        verb.add_argument(
            "--tokens", type=int, default=None, help="train on the first N tokens (default: all there are)"
        )
        verb.add_argument("--deadline", type=float, default=None, help="seconds from now at which to have ended")
        verb.add_argument("--abandon", type=float, default=None, metavar="NATS",
                          help="from half of the steps on, end an arm whose validation loss is so far above the best "
                          "one's with the same optimizer")  # fmt: skip
        verb.add_argument("--shape", choices=SHAPES, default="125m", help="size of the stacks")
        verb.add_argument("--done", type=Path, nargs="+", default=[], metavar="PLACE",
                          help="folders or collected files whose finished arms are not run again")  # fmt: skip
        verb.add_argument("--eager", action="store_true", help="do not compile blocks")
        verb.add_argument("--tiny", action="store_true", help="width 64, four layers, bytes: a trial on a CPU")
        verb.add_argument("--commit", default=None, help="recorded in the rows (default: git's)")
    for name, what in (("table", "Markdown tables"), ("plot", "plots"), ("collect", "rows, one per line")):
        verb = verbs.add_parser(name, help=f"{what} from folders or collected files")
        verb.add_argument("places", nargs="+", type=Path)
    verbs.choices["plot"].add_argument("--png", type=Path, default=Path("out/quality.png"))
    verbs.choices["plot"].add_argument("--stacks", nargs="+", default=None, help="(default: all)")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.verb == "pack":
        from quality_data import STREAMS, pack

        pack({name: getattr(options, name) for name in STREAMS}, options.to, options.part_bytes)
    elif options.verb == "table":
        print(quality_report.tables(load_rows(options.places)))
    elif options.verb == "plot":
        quality_report.picture(load_rows(options.places), options.png, options.stacks)
    elif options.verb == "collect":
        for row in load_rows(options.places):
            print(json.dumps(row))
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    if options.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(options.gpu)  # before CUDA starts
    from quality_run import Session

    session = Session(options, begin)
    if options.verb == "run":
        for name in options.arms:
            session.run(Arm.parse(name, session.steps), options.final)
    else:
        session.work_off(read_queue(options.file, session.steps))


if __name__ == "__main__":
    main()
