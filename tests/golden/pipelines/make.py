"""What the pipelines of `transformers` give in the cases of tests/tasks.py; writes outputs.json beside this file.

    python tests/golden/pipelines/make.py          # needs torch and transformers 4: 5 has fewer tasks
"""

import json
import pathlib
import sys
import tempfile


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
    import tasks
    from transformers import __version__, pipeline

    assert __version__.startswith("4."), f"transformers {__version__}: version 4 has all tasks"
    outputs = {}
    with tempfile.TemporaryDirectory() as place:
        for name in tasks.FOLDERS:
            folder = pathlib.Path(place, name)
            folder.mkdir()
            tasks.make(name, folder)
        for name, (folder, task, *_) in tasks.CASES.items():
            run = pipeline(task, model=f"{place}/{folder}", device="cpu")
            outputs[name] = tasks.asked(run, name, tasks.THEIRS)
            print(name, str(outputs[name])[:150])
    plain = json.loads(json.dumps(outputs, default=float), parse_float=lambda number: round(float(number), 6))
    tasks.OUTPUTS.write_text(json.dumps(plain, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
