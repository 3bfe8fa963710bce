import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lm_jax.config import ConfigError
from lm_jax.data import sources


def read(spec, *, invalid="error"):
    report = Counter()
    return list(sources.read(spec, invalid=invalid, report=report)), report


def dropped(spec, *, invalid="error"):
    told = []
    list(sources.read(spec, invalid=invalid, report=Counter(), dropped=told.append))
    return [tuple(document) for document in told]


def compress(path, data, codec):
    with pyarrow.CompressedOutputStream(str(path), codec) as file:
        file.write(data)


def test_the_standard_library_is_12_megabytes_of_code_without_its_tests():
    documents, report = read("stdlib")
    assert 10e6 < report["bytes"] < 14e6 and report["documents"] == len(documents) > 500
    assert len({d.id for d in documents}) == len(documents)
    assert "json/decoder.py" in {d.id for d in documents}
    assert not {"site-packages", "test", "tests", "idle_test"} & {part for d in documents for part in d.id.split("/")}
    assert documents == read("stdlib")[0]
    assert len(sources.files("stdlib")) == report["documents"] + report["empty"]


def test_a_file_is_a_document_and_its_bytes_are_untouched(tmp_path):
    texts = {"b.txt": "\ufeffone\r\ntwo\r\n \0\n", "a.txt": "é\u2028漢字\n\n", "sub/c.txt": "  three"}
    (tmp_path / "sub").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    documents, report = read(f"text:{tmp_path}/**/*.txt")
    assert [(d.id, d.text) for d in documents] == sorted(texts.items())
    assert report == {"documents": 3, "bytes": sum(len(text.encode()) for text in texts.values())}
    assert [d.id for d in read(f"text:{tmp_path}/sub/c.txt")[0]] == ["c.txt"]


def test_a_large_file_is_cut_at_line_ends_into_documents_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 256)
    monkeypatch.setattr(sources, "PIECE", 64)
    texts = {"lines.txt": "".join(f"line {i} é\n" for i in range(100)), "one.txt": "漢字é" * 100,
             "mixed.txt": "a\n" + "é" * 300 + "\n\n" + "b\n" * 50, "small.txt": "c" * 256}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    compress(tmp_path / "packed.gz", texts["lines.txt"].encode(), "gzip")
    documents, report = read(f"text:{tmp_path}/*")
    assert report["cut"] == 4 and report["documents"] == len({d.id for d in documents}) == len(documents)
    for name, text in (texts | {"packed.gz": texts["lines.txt"]}).items():
        pieces = [d for d in documents if d.id.partition(":")[0] == name]
        assert "".join(d.text for d in pieces) == text
        if name == "small.txt":
            assert [d.id for d in pieces] == [name]
            continue
        assert [d.id for d in pieces] == [f"{name}:{n:06d}" for n in range(1, len(pieces) + 1)]
        assert all(len(d.text.encode()) <= 64 for d in pieces)
        assert name in ("one.txt", "mixed.txt") or all(d.text.endswith("\n") for d in pieces)
    assert "cut" not in read(f"text:{tmp_path}/small.txt")[1]


@pytest.mark.parametrize("suffix, codec", ((".gz", "gzip"), (".zst", "zstd")))
def test_compressed_files_read_like_plain_ones(tmp_path, suffix, codec):
    rows = "".join(json.dumps({"text": f"line {i} é"}, ensure_ascii=False) + "\n" for i in range(50)).encode()
    (tmp_path / "plain.jsonl").write_bytes(rows)
    compress(tmp_path / f"packed.jsonl{suffix}", rows, codec)
    plain, packed = read(f"jsonl:{tmp_path}/plain.jsonl")[0], read(f"jsonl:{tmp_path}/packed.jsonl{suffix}")[0]
    assert [d.text for d in packed] == [d.text for d in plain] and len(plain) == 50
    assert read(f"text:{tmp_path}/*{suffix}")[0][0].text == rows.decode()


@pytest.mark.parametrize("suffix, codec", ((".gz", "gzip"), (".zst", "zstd")))
def test_a_file_truncated_in_the_middle_is_named_and_what_was_read_is_counted(tmp_path, suffix, codec):
    path, report, seen = tmp_path / f"cut.jsonl{suffix}", Counter(), []
    numbers = (pow(3, i, 10**60 + 7) for i in range(20_000))  # hard to compress: the cut is past line 1
    compress(path, b"".join(b'{"text": "%d"}\n' % n for n in numbers), codec)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ConfigError, match=f"cut.jsonl{suffix} cannot be read beyond its first") as caught:
        seen.extend(d.id for d in sources.read(f"jsonl:{path}", invalid="error", report=report))
    with pytest.raises(ConfigError, match=f"{path} cannot be read"):
        read(f"text:{path}")
    assert 0 < report["documents"] < 20_000 and f" {report['documents']} lines" in str(caught.value)


def test_json_lines_keep_ids_and_skip_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "lang": "en"}\n\n{"text": "two", "id": 7, "body": "zwei"}\r\n')
    documents, _ = read(f"jsonl:{tmp_path}/*.jsonl")
    assert [(d.id, d.text, d.lang) for d in documents] == [("a.jsonl:1", "one", "en"), ("7", "two", "")]
    with pytest.raises(ConfigError, match=r"a.jsonl:1 has no field 'body': name one of 'text', 'lang'"):
        read(f"jsonl:{tmp_path}/a.jsonl#body")


@pytest.mark.parametrize("line, said", (
    ("{'text': 1}", "not JSON"), ('["a"]', "list, not"), ('{"text": 3}', "int, not text"), ("[" * 100_000, "not JSON"),
    ('{"other": "a"}', "no field 'text'")), ids=("quotes", "list", "number", "deep", "missing"))
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    stream = sources.read(f"jsonl:{tmp_path}/bad.jsonl", invalid="error", report=Counter())
    assert next(stream).text == "good"  # nothing beyond is read yet
    with pytest.raises(ConfigError, match=f"bad.jsonl:2.*{said}"):
        next(stream)


def invalid_files(folder):
    (folder / "a.txt").write_bytes(b"caf\xe9 \xff")
    (folder / "b.txt").write_bytes("café".encode())
    (folder / "a.jsonl").write_bytes(b'{"text": "caf\xe9 \xff"}\n{"text": "caf\xc3\xa9"}\n')
    table = pyarrow.table({"text": pyarrow.array([b"caf\xe9 \xff", "café".encode()])})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return [f"text:{folder}/*.txt", f"jsonl:{folder}/*.jsonl", f"parquet:{folder}/*.parquet"]


def test_bytes_that_are_no_utf8_are_replaced_dropped_or_refused_and_counted(tmp_path):
    for spec in invalid_files(tmp_path):
        replaced, report = read(spec, invalid="replace")
        assert [d.text for d in replaced] == ["caf\ufffd \ufffd", "café"], spec
        assert report == {"documents": 2, "invalid_utf8": 1, "bytes": 10 + 5}  # as they will be tokenized
        kept, report = read(spec, invalid="drop")
        assert [d.text for d in kept] == ["café"] and report == {"documents": 1, "invalid_utf8": 1, "bytes": 5}
        (id, *why), = dropped(spec, invalid="drop")
        assert id not in {d.id for d in kept} and why == ["invalid_utf8", 2, 0], "two bytes, where none may be"
        assert not dropped(spec, invalid="replace")
        with pytest.raises(ConfigError, match="is not UTF-8.*data.invalid"):
            read(spec, invalid="error")


def test_lone_surrogates_of_json_are_invalid_and_pairs_are_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude42"}\n{"text": "\\udc80"}\n')
    documents, report = read(f"jsonl:{tmp_path}/a.jsonl", invalid="replace")
    assert report["invalid_utf8"] == 2 and documents[1].text == "🙂"
    assert documents[0].text.strip("\ufffd") == documents[0].text and documents[0].text.encode()


def test_documents_of_white_space_are_dropped_and_counted(tmp_path):
    for name, text in {"a": "", "b": " \n\t\r\n", "c": "\u3000", "d": " x "}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    documents, report = read(f"text:{tmp_path}/*")
    assert [d.text for d in documents] == [" x "] and report == {"documents": 1, "bytes": 3, "empty": 3}
    assert dropped(f"text:{tmp_path}/*") == [(name, "empty", 0, 1) for name in ("a.txt", "b.txt", "c.txt")]


def test_parquet_columns_of_strings_bytes_and_categories_are_text(tmp_path):
    texts = ["one\r\n", "zwei ü", None, "三"] * 300
    for name, type in (("s", pyarrow.string()), ("b", pyarrow.binary()), ("l", pyarrow.large_string())):
        table = pyarrow.table({"body": pyarrow.array(texts).cast(type), "n": range(1200)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=500)
    table = pyarrow.table({"body": pyarrow.array(texts).dictionary_encode(), "id": [f"doc {i}" for i in range(1200)],
                           "lang": ["en", "de", None, "zh"] * 300})
    pyarrow.parquet.write_table(table, tmp_path / "dictionary.parquet")
    for name, first in (("s", "s.parquet:1"), ("b", "b.parquet:1"), ("l", "l.parquet:1"), ("dictionary", "doc 0")):
        documents, report = read(f"parquet:{tmp_path}/{name}.parquet#body")
        assert [d.text for d in documents] == [text for text in texts if text] and documents[0].id == first
        assert {d.lang for d in documents} == ({"en", "de", "zh"} if name == "dictionary" else {""})
        assert report["empty"] == 300 and len({d.id for d in documents}) == 900
    with pytest.raises(ConfigError, match="no field 'text': name one of 'body', 'n'"):
        read(f"parquet:{tmp_path}/s.parquet")
    with pytest.raises(ConfigError, match="text in 'n'"):
        read(f"parquet:{tmp_path}/s.parquet#n")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:-50])
    with pytest.raises(ConfigError, match="bad.parquet cannot be read"):
        read(f"parquet:{tmp_path}/bad.parquet#body")


def tiny_texts(folder, texts):
    """A TFDS data set of `texts` in its training split and "four" in its test split, as ArrayRecord files."""
    import tensorflow_datasets as tfds

    class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # its files alone must do
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(texts), "test": self._generate_examples(["four"])}

        def _generate_examples(self, texts):
            yield from ((i, {"body": text}) for i, text in enumerate(texts))

    TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()


def test_tfds_data_sets_are_read_without_tensorflow(tmp_path, monkeypatch):
    texts = ["one\r\n", "zwei ü", "三"]
    tiny_texts(tmp_path, texts)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    documents, report = read("tfds:tiny_texts#body")
    assert sorted(d.text for d in documents) == sorted(texts) and report["documents"] == 3
    assert [d.text for d in read("tfds:tiny_texts:1.0.0:train[1:]#body")[0]] == [d.text for d in documents[1:]]
    assert [d.text for d in read("tfds:tiny_texts:test#body")[0]] == ["four"]
    with pytest.raises(ConfigError, match="no field 'text': name one of 'body'"):
        read("tfds:tiny_texts")
    for name, hint in (("no_such_set", "is it in .TFDS_DATA_DIR"), ("lmlb/en", "did you mean lm1b")):
        with pytest.raises(ConfigError, match=f"tfds:{name} names no data set: {hint}") as caught:
            read(f"tfds:{name}")
        assert len(str(caught.value)) < 200, "TFDS itself lists all it has"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("kind", ["parquet", "gzip", "ArrayRecord"])
def test_no_flipped_bit_of_an_input_with_checksums_is_read_in_silence(kind, tmp_path, monkeypatch, rng):
    texts = [" ".join(rng.choice("a model reads plain words of a page".split(), 30)) for _ in range(60)]
    if kind == "parquet":
        path, spec = tmp_path / "a.parquet", f"parquet:{tmp_path}/a.parquet#body"
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), path, write_page_checksum=True)
    elif kind == "gzip":
        path, spec = tmp_path / "a.jsonl.gz", f"jsonl:{tmp_path}/a.jsonl.gz#body"
        compress(path, "".join(json.dumps({"body": text}) + "\n" for text in texts).encode(), "gzip")
    else:
        tiny_texts(tmp_path, texts)
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
        path, spec = next(tmp_path.rglob("*train.array_record*")), "tfds:tiny_texts#body"
    whole, expected, seen = path.read_bytes(), read(spec), 0
    for at in rng.choice(np.flatnonzero(np.frombuffer(whole, np.uint8)), 60):  # ArrayRecord fills its file with zeros
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        try:
            assert read(spec) == expected, f"byte {at}"
        except ConfigError as error:
            assert path.name in str(error) or "tiny_texts" in str(error)
            seen += 1
    assert seen > 30


def test_specs_are_checked_before_anything_is_read():
    assert sources.parse(" stdlib ;text:/a/*.txt; ") == ["stdlib", "text:/a/*.txt"]
    for given, said in (("", "empty"), (" ; ", "empty"), ("jsnol:/a", "mean jsonl"), ("stdlib;xyz", "one of stdlib")):
        with pytest.raises(ConfigError, match=said):
            sources.parse(given)
    with pytest.raises(ConfigError, match="matches no file"):
        read("text:/no/such/*.txt")


def test_importing_the_data_package_loads_no_jax_and_no_tokenizer_library():
    code = "import sys, lm_jax.data.sources, lm_jax.data.tokenizer; print([m for m in sys.modules if m in {" \
           "'jax', 'sentencepiece', 'tokenizers', 'pyarrow', 'tensorflow_datasets'}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
