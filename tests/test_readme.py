"""What the README tells a user to type is understood: commands resolve, the files and modules it names are there."""

import importlib
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
LINES = "\n".join(BLOCKS).replace("\\\n", " ").replace("&&", "\n").splitlines()
LAUNCHED = re.compile(r".*?--command='(.*)'|(?:srun|mpirun) .*?(?=python)")  # what is said before the command itself
COMMANDS = [shlex.split(LAUNCHED.sub(r"\1", line), comments=True) for line in LINES if "lm_jax." in line]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_commands_of_the_readme_resolve(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert command[:2] == ["python", "-m"]
    module = importlib.import_module(command[2])
    if hasattr(module, "parse"):  # whose input is no config
        assert vars(module.parse([command[2], *command[3:]]))
        return
    with pytest.raises(SystemExit) as stop:
        module.main([command[2], *command[3:], "--print_config"])
    assert stop.value.code in (0, None) and '"name"' in capsys.readouterr().out


def test_there_are_commands_to_check():
    assert not re.search(r"@[A-Z]+@", TEXT), "a gap that was left to fill"
    assert len(COMMANDS) >= 6
    assert [block.count("pip install") for block in BLOCKS[:2]] == [2, 2], "two lines do all the set-up"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:lm_jax|configs|tests|docs)/[\w./]+)`", TEXT))))
def test_the_files_that_the_readme_names_exist(path):
    assert (ROOT / path).exists()
