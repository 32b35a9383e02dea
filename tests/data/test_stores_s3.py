"""Parts in an S3 store: moto's server on this machine, read and written by worker processes through s3fs."""

from __future__ import annotations

import json

import pytest

from retnet.cli import main
from retnet.data.build import build_shards
from retnet.data.plan import Settings
from retnet.data.stores import StorePath
from tests.data.folders import contents

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def bucket(monkeypatch):
    """The URL of an empty bucket; processes find the server and its keys in the environment, as users set them."""
    pytest.importorskip("s3fs", reason="needs the extra s3")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("texts")
    yield "s3://texts"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["data", *map(str, arguments)])
    return end.value.code


def test_parts_in_s3_have_the_bytes_of_one_process(bucket, tmp_path, articles, tokenizer_file, capsys):
    import s3fs

    local = tmp_path / "source"
    local.mkdir()
    (local / "a.txt").write_text("\n--\n".join(articles), encoding="utf-8")
    (local / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in articles))
    s3 = s3fs.S3FileSystem()
    s3.put(f"{local}/", "texts/source/", recursive=True)
    build_shards(
        [str(local)],
        tmp_path / "expected",
        tokenizer=str(tokenizer_file),
        settings=Settings(separator="\n--\n"),
        shard_size=2**20 // 100,
        workers=1,
    )
    expected = contents(tmp_path / "expected")
    assert len(expected) > 12
    options = ["--separator", r"\n--\n", "--tokenizer", tokenizer_file, "--shard-size", "0.01"]
    for out in (f"{bucket}/out", tmp_path / "out"):
        for k in (3, 1, 2):
            assert run(f"{bucket}/source", out, *options, "--shard", f"{k}/3", "--workers", "2") == 0
        assert run("merge", out) == 0
    assert run(f"{bucket}/source", f"{bucket}/whole", *options) == 0
    for name in ("out", "whole"):
        s3.get(f"texts/{name}/", f"{tmp_path}/{name}_of_s3/", recursive=True)
        assert contents(tmp_path / f"{name}_of_s3") == expected
        assert not s3.find(f"texts/{name}.parts")
    assert contents(tmp_path / "out") == expected
    assert run("check", tmp_path / "out_of_s3") == 0

    # what is refused
    capsys.readouterr()
    assert run(f"{bucket}/source", f"{bucket}/other", *options, "--shard", "1/2") == 0
    assert run(f"{bucket}/source", f"{bucket}/other", "--shard", "2/2") == 2
    assert "holds parts of another plan: other settings, tokenizer" in capsys.readouterr().err
    assert run("merge", f"{bucket}/other") == 2
    assert "shards of s3://texts/other are not written" in capsys.readouterr().err
    assert run(f"{bucket}/gone", f"{bucket}/other") == 2
    assert "no such file or folder: s3://texts/gone" in capsys.readouterr().err
    assert run(f"{bucket}/source", "s3://nowhere/out", *options) == 2
    assert "The specified bucket does not exist: s3://nowhere/out/tokenizer" in capsys.readouterr().err
    assert not s3.exists("nowhere")
    StorePath(f"{bucket}/other/00000.tokens").write_bytes(b"half")
    assert run(f"{bucket}/source", f"{bucket}/other", *options, "--shard", "1/1") == 0
    assert run("merge", f"{bucket}/other") == 0
    s3.get("texts/other/", f"{tmp_path}/other_of_s3/", recursive=True)
    assert contents(tmp_path / "other_of_s3") == expected
