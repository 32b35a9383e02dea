"""The HTML report of a run: one file without scripts that opens from a disk, is renewed while training runs, and stays
whole after a crash.

    callback.py  when the file is written
    facts.py     what is known before the first step: model, data, settings, machine
    page.py      the page, from facts, log and samples
    chart.py     curves as SVG
"""

from retnet.train.report.callback import REPORT_FILE, Report, Subject
from retnet.train.report.facts import all_settings, run_tables

__all__ = ["REPORT_FILE", "Report", "Subject", "all_settings", "run_tables"]
