"""Launchers: their files are well formed, refuse what is missing, start what they say; torchrun runs on two hosts."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.paths import ROOT

FOLDER = ROOT / "recipes" / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *(ROOT / "recipes" / "data").glob("*.sh")])
SKY = FOLDER / "skypilot.yaml"

# An interpreter that prints what it is asked to run.
ECHO = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 8; else echo "RUN $NODE_RANK $*"; fi
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames node[3-4]" ] && printf 'node3\\nnode4\\n'
"""
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & done
wait
"""
# Two hosts, each with its own loopback and one interface to the other. The namespaces end with the process.
TWO_HOSTS = """
set -euo pipefail
mount -t tmpfs tmpfs /run
for host in first second; do ip netns add $host; done
ip link add one netns first type veth peer name two netns second
ip -n first link set one name eth0
ip -n second link set two name eth0
ip -n first address add 10.99.0.1/24 dev eth0
ip -n second address add 10.99.0.2/24 dev eth0
for host in first second; do ip -n $host link set lo up; ip -n $host link set eth0 up; done
[ $# -gt 0 ] || exit 0
export NODES=2 MASTER_ADDR=10.99.0.1 PROCESSES=1 INTERFACE=eth0
NODE_RANK=1 nsenter --net=/run/netns/second bash recipes/launch/torchrun.sh "$@" &
NODE_RANK=0 nsenter --net=/run/netns/first bash recipes/launch/torchrun.sh "$@"
wait $!
"""
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-c", TWO_HOSTS, "two_hosts"]


def run(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in the root of the checkout, without variables of a launcher."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NODE", "MASTER"))}
    return subprocess.run(
        list(map(str, words)), cwd=ROOT, env=outer | variables, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def programs(tmp_path):
    """A folder of programs in the place of others, by name."""

    def write(**contents: str) -> Path:
        for name, content in contents.items():
            file = tmp_path / name
            file.write_text(content)
            file.chmod(0o755)
        return tmp_path

    return write


def with_path(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_that_stops_at_errors(script):
    assert run("bash", "-n", script).stderr == ""
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "NODES is ''; accepted: the number of machines"),
        ({"NODES": "two"}, "NODES is 'two'; accepted: the number of machines"),
        ({"NODES": "2"}, "NODE_RANK is ''; accepted: the number of this machine, from 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2'; accepted: the number of this machine, from 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR is empty; accepted: the address of machine 0"),
    ],
)
def test_torchrun_demands_what_it_cannot_know(variables, message):
    done = run("bash", FOLDER / "torchrun.sh", "train", "x.yaml", **variables)
    assert (done.returncode, done.stderr.strip()) == (2, message)


def test_torchrun_gets_the_words_and_the_addresses(programs):
    python = programs(echo=ECHO) / "echo"
    done = run(
        "bash", FOLDER / "torchrun.sh", "train", "a b.yaml", "max_steps=3",
        NODES="2", NODE_RANK="1", MASTER_ADDR="host0", PYTHON=str(python),
    )  # fmt: skip
    assert done.stdout.strip() == (
        "RUN 1 -m torch.distributed.run --nnodes=2 --node_rank=1 --nproc_per_node=8 --master_addr=host0 "
        "--master_port=29500 -m retnet.cli train a b.yaml max_steps=3"
    )


def test_slurm_starts_one_torchrun_per_node_with_its_number(programs):
    folder = programs(echo=ECHO, scontrol=SCONTROL, srun=SRUN)
    done = run(
        "bash", FOLDER / "slurm.sh", "train", "a b.yaml",
        PATH=with_path(folder), PYTHON=str(folder / "echo"), SLURM_JOB_NODELIST="node[3-4]", SLURM_NNODES="2",
        SLURM_JOB_ID="40007",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"RUN {rank} -m torch.distributed.run --nnodes=2 --node_rank={rank} --nproc_per_node=8 --master_addr=node3 "
        "--master_port=20007 -m retnet.cli train a b.yaml"
        for rank in (0, 1)
    ]
    outside = run("bash", FOLDER / "slurm.sh", "train", "x.yaml")
    assert outside.returncode != 0
    assert "SLURM_JOB_NODELIST: is not set; accepted: sbatch" in outside.stderr


def test_the_task_of_skypilot_runs_torchrun_on_each_machine(programs):
    task = yaml.safe_load(SKY.read_text())
    assert {name for name, value in task["envs"].items() if value is None} == {
        "ARGUMENTS",
        "BUCKET",
    }  # sky asks for them
    assert run("bash", "-n", "-c", task["setup"]).stderr == ""
    python = programs(echo=ECHO) / "echo"
    done = run(
        "bash", "-c", task["run"].replace(".venv/bin/python", str(python)),
        ARGUMENTS="train x.yaml max_steps=3", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
        SKYPILOT_NUM_GPUS_PER_NODE="4", SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6",
    )  # fmt: skip
    assert done.stdout.strip() == (
        "RUN 1 -m torch.distributed.run --nnodes=2 --node_rank=1 --nproc_per_node=4 --master_addr=10.0.0.5 "
        "--master_port=29500 -m retnet.cli train x.yaml max_steps=3"
    )


def test_the_task_of_skypilot_has_its_schema():
    schemas = pytest.importorskip("sky.utils.schemas", reason="SkyPilot is not installed")
    jsonschema = pytest.importorskip("jsonschema")
    task = yaml.safe_load(SKY.read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    for mount in task["file_mounts"].values():
        jsonschema.validate(mount, schemas.get_storage_schema())


@pytest.mark.slow
def test_two_hosts_train_as_one_process(tmp_path):
    try:
        possible = run(*UNSHARE)
    except FileNotFoundError as error:
        pytest.skip(f"no {error.filename} on this machine")
    if possible.returncode:
        pytest.skip(f"no network namespaces here: {possible.stderr.strip()}")
    settings = {
        "model": "retnet-tiny", "data": "stdlib", "length": 64, "max_steps": 4, "logging_steps": 1, "num_samples": 0,
        "do_eval": False, "save_strategy": "no", "learning_rate": 1e-3,
    }  # fmt: skip
    words = ["train", *(f"{key}={value}" for key, value in settings.items())]
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    rows = {"one": 4, "two": 2}
    alone = [f"output_dir={tmp_path}/one", f"per_device_train_batch_size={rows['one']}"]
    shared = [f"output_dir={tmp_path}/two", f"per_device_train_batch_size={rows['two']}"]
    done = run(sys.executable, "-m", "retnet.cli", *words, *alone, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(*UNSHARE, *words, *shared, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("saved in") == 1  # the first process prints
    losses = {name: losses_of(tmp_path / name) for name in rows}
    assert len(losses["one"]) == settings["max_steps"]
    assert losses["two"] == pytest.approx(losses["one"], rel=2e-5)


def losses_of(output: Path) -> list[float]:
    log = json.loads((output / "training.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def test_the_commands_of_the_readme_name_files_that_exist():
    text = (FOLDER / "README.md").read_text()
    words = {word for block in text.split("```")[1::2] for word in shlex.split(block.partition("\n")[2], comments=True)}
    files = {word for word in words if word.startswith("recipes/launch/")}
    assert files == {f"recipes/launch/{name}" for name in ("torchrun.sh", "slurm.sh", "skypilot.yaml")}
    assert all((ROOT / file).is_file() for file in files)
