"""Tensors are read into any mesh, in their own types, with little memory; and what is no whole model is refused."""

import json
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import TOKENS, close, same_tensors

from lm_jax import hub, parallel
from lm_jax.config import ConfigError, MeshConfig
from lm_jax.errors import DataError
from lm_jax.hub import folder as folders
from lm_jax.hub import stream, tensors
from lm_jax.models import flops, transformer


@pytest.mark.parametrize("name, shape", [("gpt2", MeshConfig(fsdp=4, model=2)),
                                         ("deepseek", MeshConfig(fsdp=2, model=2, expert=2))], ids=["gpt2", "deepseek"])
def test_a_model_is_read_into_the_shards_of_a_mesh_and_out_of_them(name, shape, folder, tmp_path, monkeypatch):
    alone = hub.load(folder(name))
    expected = hub.logits(alone, [TOKENS] * 8)
    monkeypatch.setattr(stream, "CHUNK", 4096 if name == "gpt2" else stream.CHUNK)  # a few rows at a time, or all
    with jax.set_mesh(parallel.make_mesh(shape)):
        model = hub.load(folder(name))
        table = model.embed.table[...]
        assert len({str(shard.index) for shard in table.addressable_shards}) > 1
        close(hub.logits(model, [TOKENS] * 8), expected)
        hub.save(model, tmp_path)
    same_tensors(folder(name), tmp_path)


def test_shards_on_disk_are_read_and_written(folder, tmp_path):
    model = hub.load(folder("llama"))
    hub.save(model, tmp_path / "cut", shard=10_000)
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == 4 * flops.parameters(model.cfg)["total"]
    same_tensors(folder("llama"), tmp_path / "cut")
    hub.save(hub.load(tmp_path / "cut"), tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["config.json", "model.safetensors"]
    same_tensors(folder("llama"), tmp_path / "cut")


def test_every_tensor_keeps_its_own_type(folder, tmp_path):
    """A file may mix types (DeepSeek's routers); the model computes in that of most weights."""
    source = tensors.read(folder("deepseek") / "model.safetensors")
    types = {name: np.float32 if "mlp.gate" in name or "norm" in name else ml_dtypes.bfloat16 for name in source}
    entries = {name: (np.dtype(types[name]), source[name].shape) for name in tensors.ordered(source | {
        name: (np.dtype(types[name]), ()) for name in source})}
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/config.json").write_text((folder("deepseek") / "config.json").read_text())
    tensors.write(tmp_path / "mixed/model.safetensors", entries, (source[n].rows().astype(types[n]) for n in entries))
    model = hub.load(tmp_path / "mixed")
    assert model.cfg.dtype == "bfloat16" and model.decoder.blocks.mlp.router.w[...].dtype == jnp.float32
    assert model.embed.table[...].dtype == jnp.bfloat16
    hub.save(model, tmp_path / "out")
    same_tensors(tmp_path / "mixed", tmp_path / "out")
    trained = hub.load(tmp_path / "mixed", weights="float32", dtype="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    scale = np.abs(hub.logits(trained, [TOKENS])).max()
    assert np.abs(hub.logits(trained, [TOKENS]) - hub.logits(model, [TOKENS])).mean() < 0.03 * scale


def test_weights_of_8_bits_are_read_with_the_scales_of_their_blocks(tmp_path):
    """Blocks of 128 x 128, those at the edges smaller; by rows, as a mesh reads them."""
    rng = np.random.default_rng(0)
    small = rng.standard_normal((300, 200)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.array([[1, 2], [4, 8], [16, 32]], np.float32) / 3
    arrays = {"up.weight": small, "up.weight_scale_inv": scales, "norm.weight": np.ones(4, np.float32)}
    tensors.write(tmp_path / "model.safetensors", {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.values())
    read = folders.read(tmp_path)
    assert read.keys() == {"up.weight", "norm.weight"} and read["up.weight"].shape == (300, 200)
    expected = np.array([[small[i, j] * scales[i // 128, j // 128] for j in range(200)] for i in range(300)])
    for start, stop in ((0, None), (0, 128), (100, 140), (127, 129), (256, 300), (299, 300), (140, 140)):
        found = read["up.weight"].rows(start, stop)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, expected[start:stop].astype(ml_dtypes.bfloat16))


def test_weights_of_8_bits_are_said_and_other_blocks_refused(folder, tmp_path):
    up = "model.layers.1.mlp.up_proj.weight"
    source = {name: tensor.rows() for name, tensor in tensors.read(folder("llama") / "model.safetensors").items()}
    arrays = source | {up: source[up].astype(ml_dtypes.float8_e4m3fn),
                       f"{up}_scale_inv": np.full((1, 1), 0.5, np.float32)}
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    tensors.write(tmp_path / "model.safetensors", {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.values())
    said = []
    read = np.asarray(hub.load(tmp_path, say=said.append).decoder.blocks.mlp.up.w[...][1])
    np.testing.assert_array_equal(read.T.astype(np.float32), arrays[up].astype(np.float32) * 0.5)
    assert len(said) == 1 and "1 tensors of 8 bits a number are kept as the bfloat16 that they stand for" in said[0]
    spoil(tmp_path, quantization_config={"weight_block_size": [64, 128]})
    with pytest.raises(ConfigError, match="weight_block_size=.64, 128.*only .128, 128. can be read"):
        hub.load(tmp_path)


def test_a_model_that_replaces_another_leaves_nothing_of_it(folder, llama):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (llama / name).write_text("{}")
    (llama / "notes.md").write_text("mine")
    hub.save(hub.load(folder("gpt2")), llama)
    assert sorted(path.name for path in llama.iterdir()) == ["config.json", "model.safetensors", "notes.md"]


def test_the_host_holds_little_more_than_the_devices(folder, tmp_path):
    """Peak memory of a load, in a process of its own: the model (on a CPU the host's too) and 1.3 times its largest
    tensor. A smaller model is loaded before, for what JAX itself takes."""
    sizes = dict(vocab_size=40_000, hidden_size=512, intermediate_size=4096, head_dim=128)
    shape = {99: 40_000, 32: 512, 16: 256, 48: 4096}
    spoil(shutil.copytree(folder("llama"), tmp_path / "large"), **sizes, change=lambda arrays: {
        name: np.zeros([shape[n] for n in array.shape], np.float32) for name, array in arrays.items()})
    program = """
import resource, sys
import jax
from lm_jax import hub
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
hub.load(sys.argv[1])
before = peak()
model = hub.load(sys.argv[2])
print(peak() - before, sum(a.nbytes for a in jax.tree.leaves(model)), model.embed.table[...].nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder("llama")), str(tmp_path / "large")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown, model, largest = map(int, done.stdout.split())
    assert model > 2e8 and grown < model + 1.3 * largest, f"{grown / 2**20:.0f} MiB for {model / 2**20:.0f} of model"


@pytest.fixture
def llama(folder, tmp_path):
    """A copy of a whole folder, to be spoiled."""
    return shutil.copytree(folder("llama"), tmp_path / "llama")


def spoil(llama, *, change=None, header=None, data=None, **settings):
    """Rewrite parts of a folder: its tensors, its file's header or bytes, settings of its config.json."""
    file, json_file = llama / "model.safetensors", llama / "config.json"
    if change:
        arrays = change({name: tensor.rows() for name, tensor in tensors.read(file).items()})
        tensors.write(file, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.values())
    if header:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = json.dumps(header(json.loads(raw[8:8 + length]))).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length:])
    if data:
        file.write_bytes(data(file.read_bytes()))
    json_file.write_text(json.dumps(json.loads(json_file.read_text()) | settings))


NORM = "model.norm.weight"
put = lambda name, **entry: lambda header: header | {name: header[name] | entry}


@pytest.mark.parametrize("how, said", [
    (dict(data=lambda raw: raw[:-7]), "is truncated: its header says 1"),
    (dict(data=lambda raw: raw[:5]), "truncated, or no safetensors"),
    (dict(data=lambda raw: raw + b"more"), "bytes that no tensor owns"),
    (dict(data=lambda raw: b"\xff" * 8 + raw[8:]), "its header is to have"),
    (dict(data=lambda raw: raw[:8] + b"x" + raw[9:]), "damaged header"),
    (dict(header=put(NORM, data_offsets=[0, 10**12])), "1000000000000 bytes for F32"),
    (dict(header=put(NORM, data_offsets=[0, 128])), "begins at byte"),
    (dict(header=put(NORM, shape=[-32])), "sizes (-32,)"),
    (dict(header=put(NORM, dtype="F99")), "dtype 'F99' is none of"),
    (dict(change=lambda a: {name: a[name] for name in a if name != NORM}), "lacks 1 of the model's 30 tensors, such as "
     "'model.norm.weight' of [32]"),
    (dict(change=lambda a: a | {NORM: np.ones(31, np.float32)}), "model.norm.weight: [32] expected, [31] found"),
    (dict(change=lambda a: a | {"model.layers.3.more.weight": a[NORM]}), "'model.layers.3.more.weight' of [32]"),
    (dict(change=lambda a: a | {NORM: np.ones(32, np.int32)}), "'model.norm.weight' is of type int32"),
    (dict(num_hidden_layers=2), "tensors that a llama of 2 layers has not"),
    (dict(model_type="lama"), "model_type 'lama' is not known: nearest is 'llama'"),
    (dict(architectures=["LlamaForCausalLLM"]), "nearest is 'LlamaForCausalLM'"),
    (dict(hidden_size=None), "config.json has no 'hidden_size'"),
    (dict(mlp_bias=True), "mlp_bias=True is not supported"),
    (dict(hidden_act="quick_gelu"), "hidden_act='quick_gelu' is not known: nearest is 'gelu'"),
    (dict(rope_parameters={"rope_type": "longrope"}), "rope_type='longrope' is not supported"),
    (dict(rope_parameters={"rope_type": "llama3"}), "none of a model of type 'llama': KeyError('low_freq_factor')"),
    (dict(vocab_size="many"), "none of a model of type 'llama'"),
    (dict(train={}), "is a run's folder: `python -m lm_jax.convert"),
    (dict(num_key_value_heads=3), "model.heads=4 over model.kv_heads=3"),
    (dict(model_type=["llama"]), "model_type ['llama'] is not known"),
    (dict(architectures=[None]), "architectures=[None]: a list of names"),
    (dict(architectures="LlamaForCausalLM"), "architectures='LlamaForCausalLM': a list of names"),
    (dict(num_attention_heads=0), "model.heads=0: at least 1"),
    (dict(num_hidden_layers=-1), "model.depth=-1: at least 1"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 0}), "model.rope.theta=0.0: above 0"),
    (dict(rms_norm_eps=-1), "model.norm_eps=-1.0: at least 0"),
])
def test_what_is_no_whole_model_is_refused_with_what_is_wrong(how, said, llama):
    spoil(llama, **how)
    with pytest.raises(ConfigError) as error:
        hub.load(llama)
    assert said in str(error.value)


def test_a_folder_without_a_config_or_weights_says_what_is_there(llama, tmp_path):
    (llama / "config.json").unlink()
    with pytest.raises(ConfigError, match="has no config.json .model.safetensors is in it"):
        hub.load(llama)
    with pytest.raises(ConfigError, match="is neither a folder nor a name"):
        hub.load(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "\xff"])
def test_what_is_no_json_is_damaged(name, text, llama):
    (llama / name).write_text(text, "latin-1")
    with pytest.raises(DataError, match=f"{name} (is no JSON|has a list)"):
        hub.load(llama)


def test_a_header_of_a_hundred_thousand_brackets_is_damaged(llama):
    (llama / "model.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(DataError, match="damaged header"):
        hub.load(llama)


def test_a_folder_where_the_weights_should_be_is_damaged(llama):
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors").mkdir()
    with pytest.raises(DataError, match="model.safetensors is no file"):
        hub.load(llama)


@pytest.mark.parametrize("files", [3, ["x"], None])
def test_an_index_whose_files_have_no_names_is_damaged(files, llama):
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: files}}))
    with pytest.raises(DataError, match="names no file for each tensor"):
        hub.load(llama)


def test_a_pickle_is_refused_and_never_opened(llama, tmp_path):
    (llama / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ConfigError, match="pytorch_model.bin: opening such a file can run whatever"):
        hub.load(llama)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name, said", [
    ("../llama.safetensors", "outside its folder"), ("/etc/model.safetensors", "outside its folder"),
    ("..", "outside its folder"), ("a/../../b.safetensors", "outside its folder"), ("other.bin", "only safetensors"),
    ("model-2.safetensors", "is not there")])
def test_an_index_names_files_of_its_own_folder_only(name, said, llama):
    shutil.copy(llama / "model.safetensors", llama.parent / "llama.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors.read(llama / "model.safetensors"), name)}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=said):
        hub.load(llama)


def test_a_tokenizer_with_more_ids_than_embeddings_is_another_models(llama):
    vocabulary = {f"word{i}": i for i in range(99)}
    (llama / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    hub.load(llama)
    (llama / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary | {"more": 99}}}))
    with pytest.raises(ConfigError, match="tokenizer has 100 ids and the model 99"):
        hub.load(llama)


def test_tensors_of_another_head_are_left_out_and_it_is_said(folder, tmp_path):
    """As of bert-base-uncased, whose file has a pooler that its own architecture does not read."""
    shutil.copytree(folder("bert"), tmp_path, dirs_exist_ok=True)
    spoil(tmp_path, architectures=["BertForMaskedLM"], change=lambda arrays: arrays | {
        "cls.predictions.decoder.weight": arrays["bert.embeddings.word_embeddings.weight"]})
    said = []
    assert hub.load(tmp_path, say=said.append).pooler is None
    assert len(said) == 1 and "4 tensors that BertForMaskedLM has no use for" in said[0]


def test_names_from_before_are_understood(folder, tmp_path):
    """GPT-2's own file has no prefix, and masks as buffers; BERT's, from TensorFlow, gamma and beta."""
    old = {"gpt2": lambda name: name.removeprefix("transformer."),
           "bert": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta")}
    for family, rename in old.items():
        target = shutil.copytree(folder(family), tmp_path / family)
        spoil(target, change=lambda arrays: {rename(name): array for name, array in arrays.items()} | (
            {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32)} if family == "gpt2" else {}))
        assert not tensors.read(target / "model.safetensors").keys() <= tensors.read(
            folder(family) / "model.safetensors").keys()
        close(hub.logits(hub.load(target), [TOKENS[:5]]), hub.logits(hub.load(folder(family)), [TOKENS[:5]]), 1e-7)


@pytest.mark.parametrize("settings, said", [
    (dict(causal=False), "causal=False: only attention, dropout, dtype, remat can be set"),
    (dict(dtpe="float32"), "nearest is 'dtype'"), (dict(dtype="flot32"), "dtype='flot32': choose one of float32"),
    (dict(weights="flot32"), "weights='flot32': choose one of float32"), (dict(dropout=1.5), "dropout=1.5: at least 0"),
    (dict(dropout="x"), "dropout='x': at least 0"),
])
def test_only_how_a_model_computes_can_be_set_where_it_is_loaded(settings, said, folder):
    with pytest.raises(ConfigError, match=said):
        hub.load(folder("gpt2"), **settings)


def test_a_model_taken_apart_is_not_saved(folder, tmp_path):
    with pytest.raises(ConfigError, match="taken apart.*save the one it was made from"):
        hub.save(transformer.apart(hub.load(folder("gpt2"))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_a_model_cannot_read_are_refused(folder):
    model = hub.load(folder("gpt2"))
    for rows in ([1, 2, 3], [[1.7, 2.2]], "hello", [["a"]], [[[1]]], [[1, [2]]]):
        with pytest.raises(ConfigError, match="is no row of ids: pass a list of rows"):
            hub.logits(model, rows)
    with pytest.raises(ConfigError, match="a row without tokens"):
        hub.logits(model, [[1], []])
    with pytest.raises(ConfigError, match="token 99 is none of this model's 99"):
        hub.logits(model, [[1, 99]])
    with pytest.raises(ConfigError, match="row 0 has 65 tokens and this model learned 64 positions"):
        hub.logits(model, [[1] * 65])
    with pytest.raises(ConfigError, match="decoder_tokens"):
        hub.logits(model, [[1]], [[1]])
