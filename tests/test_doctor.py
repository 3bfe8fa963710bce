"""What the doctor says of a folder is what a restart then does."""

import json
import shutil

import pytest
from test_trainer import run

from lm_jax import train
from lm_jax.errors import ConfigError
from lm_jax.lease import HOST
from lm_jax.recipes import doctor
from lm_jax.workdir import Workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, stop_at=5)
    return folder


def said(folder, capsys) -> tuple[int, str]:
    code = train.main(["train", f"--doctor={folder}"])
    return code, capsys.readouterr().out


def test_a_folder_in_every_state_is_told_and_left_as_it_is(trained, tmp_path, capsys):
    whole = tmp_path / "whole"
    shutil.copytree(trained, whole)
    newest = max(int(path.name) for path in (whole / "checkpoints").iterdir())
    before = sorted(path.name for path in whole.rglob("*"))
    code, text = said(whole, capsys)
    assert code == 0 and f"a restart goes on from step {newest}" in text and "whole, every file" in text
    assert sorted(path.name for path in whole.rglob("*")) == before

    files = (path for path in (whole / "checkpoints" / str(newest)).rglob("*") if path.is_file())
    file = max(files, key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (whole / "metrics.jsonl").open("a").write('{"step": 9')
    code, text = said(whole, capsys)
    assert code == 0 and f"checkpoint {newest}: damaged" in text and "a restart goes on from step 4" in text
    assert f"makes {newest - 4} steps again" in text

    shutil.rmtree(whole / "checkpoints" / "4")
    assert said(whole, capsys)[0] == 79
    shutil.rmtree(whole / "checkpoints")
    code, text = said(whole, capsys)
    assert code == 0 and "a restart begins at the first step" in text


def test_the_rows_of_a_run_are_read_once(trained, monkeypatch, capsys):
    read = []
    monkeypatch.setattr(doctor, "_rows", lambda path, rows=doctor._rows: read.append(path) or rows(path))
    assert "a restart goes on from step" in said(trained, capsys)[1] and read == [trained / "metrics.jsonl"]


def test_a_folder_in_use_and_one_that_is_none_are_told(trained, tmp_path, capsys):
    holder = Workdir(trained)
    holder.open(json.loads((trained / "config.json").read_text()))
    try:
        code, text = said(trained, capsys)
        assert code == 2 and "in use by process" in text
    finally:
        holder.close()
    (trained / "lease").write_text(json.dumps({"host": HOST, "name": "here", "process": 1, "beats": 3}))  # killed
    code, text = said(trained, capsys)
    assert code == 0 and "a restart goes on" in text
    (trained / "lease").write_text(json.dumps({"host": "other", "name": "there", "process": 1, "beats": 3}))
    code, text = said(trained, capsys)
    assert code == 2 and "process 1 on there, if it still lives" in text
    (trained / "lease").unlink()
    with pytest.raises(ConfigError, match="there is no such folder"):
        said(tmp_path / "none", capsys)
    with pytest.raises(ConfigError, match="config.json is missing"):
        said(tmp_path, capsys)
    with pytest.raises(ConfigError, match="stands alone"):
        train.main(["train", "--doctor=x", "--config=configs/tiny.py"])


def test_a_diverged_run_and_a_folder_without_a_manifest_are_told(tmp_path, capsys):
    run(tmp_path, steps=40, bad=range(9, 10_000), train={"rollbacks": 0})
    Workdir(tmp_path).write_json("summary.json", {"status": "diverged"})
    code, text = said(tmp_path, capsys)
    assert code == 78 and "train.rollbacks" in text
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    code, text = said(tmp_path, capsys)
    assert code == 79 and "checkpoint 7: damaged: it has no MANIFEST.json" in text


def test_what_a_start_took_is_told_and_damaged_records_are_survived(trained, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    seconds = {"start": 6.0, "data": 1.0, "restore": 2.0, "compile": 3.0, "step": 50.0, "save": 1.0}
    (folder / "phases.json").write_text(json.dumps({"until": 0, "seconds": seconds}))
    manifest = {"parameters": {"total": 9}, "data_digest": "", "code_revision": "", "devices": 1, "device": "cpu",
                "starts": ["", "", ""]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "a start took 4.0 s until it trained" in said(folder, capsys)[1]
    for name in ("manifest.json", "summary.json"):
        (folder / name).write_text("{")
    code, text = said(folder, capsys)
    assert code == 0 and "manifest.json is damaged" in text and "a restart goes on" in text
