"""Save and load in one process: what a checkpoint holds, and which loads work, raise, or stay as they were."""

import copy
import json
import pickle
import re

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from saving_models import AUTO, FAMILIES, inputs, llama, output
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel
from transformers.models.auto import modeling_auto

import sa_hf
from sa_hf import ConfigVersionError, SparseAttentionError
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import sparse_class, unpatch_model

WINDOW = sa_hf.SlidingWindowAttentionConfig(window=5, num_sink_tokens=1)
LOAD_CALL = r"sa_hf: load with AutoModelForCausalLM\.from_pretrained\(\.\.\., trust_remote_code=True\)"
PATTERN = {"0": WINDOW, "1": "bigbird"}


def patched(family="llama"):
    return patch_model(FAMILIES[family](), PATTERN)


def load(folder, auto=AutoModelForCausalLM, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A patched Llama and its checkpoint, to read from."""
    model = patched()
    folder = tmp_path_factory.mktemp("saved") / "llama"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits(tmp_path, family):
    model = patched(family)
    given = inputs(model)
    expected = output(model, given)
    assert not torch.equal(expected, output(unpatch_model(copy.deepcopy(model)), given))
    model.save_pretrained(tmp_path / family)
    loaded = load(tmp_path / family, AUTO[family])
    assert torch.equal(output(loaded, given), expected)
    assert type(loaded).__name__ == type(model).__name__
    assert loaded.config.sa_hf == model.config.sa_hf
    loaded.save_pretrained(tmp_path / "again")
    first, again = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in (family, "again"))
    if family == "bert" and Version(transformers.__version__) < Version("5.6"):
        # 5.5.0 saves the norms of any BERT that it has loaded as beta and gamma.
        weights, resaved = (load_bytes(files.pop("model.safetensors")) for files in (first, again))
        for old, new in ((".beta", ".bias"), (".gamma", ".weight")):
            resaved = {name.replace(old, new): value for name, value in resaved.items()}
        assert weights.keys() == resaved.keys()
        assert all(torch.equal(value, resaved[name]) for name, value in weights.items())
    assert first == again
    assert torch.equal(output(load(tmp_path / "again", AUTO[family]), given), expected)


def test_what_the_config_holds(saved):
    model, folder = saved
    config = config_of(folder)
    assert config["sa_hf"] == model.config.sa_hf
    assert config["sa_hf"]["layers"]["decoder"]["0"] == WINDOW.to_dict()
    assert re.fullmatch(rf"{LOAD_CALL}; a trainer that is given the path .*\(trl: .*\)", config["attn_implementation"])
    assert not re.search(r"/|sdpa|flash|flex_attention", config["attn_implementation"])
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["SparseLlamaForCausalLM"]
    assert config["auto_map"] == {
        "AutoModel": "modeling_sa_hf.LlamaModel",
        "AutoModelForCausalLM": "modeling_sa_hf.LlamaForCausalLM",
        "AutoModelForQuestionAnswering": "modeling_sa_hf.LlamaForQuestionAnswering",
        "AutoModelForSequenceClassification": "modeling_sa_hf.LlamaForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_sa_hf.LlamaForTokenClassification",
    }
    assert not any(path.is_dir() for path in folder.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_auto_class(tmp_path, family):
    """Each Auto class of the architecture gives what it gives of the dense checkpoint, but sparse."""
    model = patched(family)
    model.save_pretrained(tmp_path / family)
    unpatch_model(model).save_pretrained(tmp_path / "dense")
    entries = config_of(tmp_path / family)["auto_map"]
    assert len(entries) >= 3
    for name, reference in entries.items():
        auto, options = getattr(modeling_auto, name), {"output_loading_info": True, "ignore_mismatched_sizes": True}
        sparse, info = load(tmp_path / family, auto, **options)
        dense, dense_info = auto.from_pretrained(tmp_path / "dense", **options)
        assert info == dense_info
        assert f"modeling_sa_hf.{type(sparse).__name__}" == reference
        assert type(sparse).__name__ == type(dense).__name__
        assert isinstance(sparse, type(dense))
        new = info["missing_keys"] | {entry[0] for entry in info["mismatched_keys"]}
        own, dense_weights = sparse.state_dict(), dense.state_dict()
        assert own.keys() == dense_weights.keys()
        assert all(torch.equal(own[key], dense_weights[key]) for key in own if key not in new)
        assert sparse.sa_hf_patch.assignment
        assert "sa_hf" in vars(sparse.config)


def test_base_model_and_inner_model(tmp_path):
    """The model inside saves by itself, too, and loads into the outer class and back."""
    model = patched("bert")
    given = inputs(model)
    expected = output(model.bert, given)
    model.bert.save_pretrained(tmp_path / "inner")
    model.save_pretrained(tmp_path / "outer")
    for folder in ("inner", "outer"):
        assert torch.equal(output(load(tmp_path / folder, AutoModel), given), expected)
    loaded = load(tmp_path / "inner", AutoModelForSequenceClassification)
    assert torch.equal(output(loaded.bert, given), expected)


PLAIN_LOADS = {
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "auto, no trust": lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
    "class": lambda folder: type(llama()).from_pretrained(folder),
    "class and trust": lambda folder: type(llama()).from_pretrained(folder, trust_remote_code=True),
    "from config": lambda folder: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    "class from config": lambda folder: type(llama())(AutoConfig.from_pretrained(folder)),
    "another architecture": lambda folder: BertModel.from_pretrained(folder),
}


@pytest.mark.parametrize("way", PLAIN_LOADS)
def test_plain_loads_raise_with_the_remedy(saved, way):
    with pytest.raises(ValueError, match=LOAD_CALL):
        PLAIN_LOADS[way](saved[1])


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("llama", "AutoModelForCausalLM"),
    ],
)
def test_the_remedy_names_the_auto_class_of_what_was_saved(tmp_path, family, auto):
    """Also where the model and the one inside it, which share a config, are saved in turn."""
    model = patched(family)
    name, inner = type(model).__name__, model.base_model
    inner_auto = auto if inner is model else "AutoModel"
    for one, wanted in ((model, auto), (inner, inner_auto), (model, auto)):
        one.save_pretrained(tmp_path / "m")
        remedy = f"sa_hf: load with {wanted}.from_pretrained(..., trust_remote_code=True); a trainer that is given"
        assert config_of(tmp_path / "m")["attn_implementation"].startswith(remedy)
    assert type(load(tmp_path / "m", getattr(modeling_auto, auto))).__name__ == name


def test_checkpoints_with_the_remedy_of_old_load(tmp_path, saved):
    model = patched()
    model.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", attn_implementation="sa_hf: load with trust_remote_code=True")
    loaded = load(tmp_path / "m")
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        type(llama()).from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("implementation", ["eager", "sdpa", {"": "sdpa"}])
def test_an_explicit_attention_raises_with_trust(saved, implementation):
    with pytest.raises(SparseAttentionError, match="would replace the sparse attention"):
        load(saved[1], attn_implementation=implementation)


def test_an_explicit_attention_raises_in_memory(saved):
    with pytest.raises(SparseAttentionError, match=r"sa_hf\.dense"):
        load(saved[1]).set_attn_implementation("sdpa")


def test_a_copy_of_the_live_config_does_not_run_dense():
    """Built from a patched model's own config object, a plain model raises at its first forward at the latest."""
    model = patched()
    plain = type(llama())(copy.deepcopy(model.config))
    with pytest.raises(SparseAttentionError, match="trust_remote_code=True"):
        plain(**inputs(model))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        type(llama())(type(model.config)(**model.config.to_dict()))


def test_config_loads_and_saves_alone(tmp_path, saved):
    config = AutoConfig.from_pretrained(saved[1])
    assert config.sa_hf == saved[0].config.sa_hf
    saved[0].config.save_pretrained(tmp_path)
    # A config knows no folder around it; the model's own save names the class that is none of Transformers'.
    assert config_of(tmp_path) == {**config_of(saved[1]), "architectures": ["LlamaForCausalLM"]}


def test_from_config_with_trust(saved):
    config = AutoConfig.from_pretrained(saved[1])
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.config.sa_hf == saved[0].config.sa_hf
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # the caller's config is as it was
        type(llama())(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 99}, ConfigVersionError, "version 99.*update it"),
        ({"news": 1}, ConfigVersionError, "news"),
        ({"layers": {"decoder": {"0": {"name": "sliding_window", "span": 3}}}}, ConfigVersionError, "span"),
        ({"layers": {"decoder": {"0": {"name": "sliding_window", "version": 7}}}}, ConfigVersionError, "version 7"),
        ({"layers": {"decoder": {"0": {"name": "os.system"}}}}, SparseAttentionError, "unknown pattern 'os.system'"),
        ({"layers": {"decoder": {"0": {"name": "sliding_window", "window": 2**40}}}}, SparseAttentionError, "nearest"),
        ({"layers": {"decoder": {"9": {"name": "sliding_window"}}}}, SparseAttentionError, "layer 9"),
        ({"layers": {"encoder": {"0": {"name": "sliding_window"}}}}, SparseAttentionError, "encoder"),
        ({"layers": []}, SparseAttentionError, "layers"),
    ],
)
def test_hostile_and_newer_configs(tmp_path, changes, error, message):
    model = patched()
    model.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", sa_hf={**model.config.sa_hf, **changes})
    with pytest.raises(error, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize("name", ["os", "PreTrainedModel", "AutoModel", "pipeline", "LlamaConfig", "x"])
def test_auto_map_names_nothing_but_model_classes(tmp_path, name):
    patched().save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", auto_map={"AutoModelForCausalLM": f"modeling_sa_hf.{name}"})
    with pytest.raises(AttributeError, match=name):
        load(tmp_path / "m")


def test_without_the_key(tmp_path):
    model = patched()
    model.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", sa_hf=None)
    with pytest.raises(SparseAttentionError, match="no 'sa_hf' key"):
        load(tmp_path / "m")


def test_unpatched_is_ordinary(tmp_path, saved):
    """After unpatch_model a save writes what the model would have written before, over the sparse one as well."""
    llama().save_pretrained(tmp_path / "before")
    for name, model in {"patched here": patched(), "loaded": load(saved[1])}.items():
        folder = tmp_path / name
        model.save_pretrained(folder)
        assert (folder / "modeling_sa_hf.py").exists()
        unpatch_model(model)
        assert type(model) is type(llama())
        model.save_pretrained(folder)
        after, before = ({p.name: p.read_bytes() for p in x.iterdir()} for x in (folder, tmp_path / "before"))
        assert after == before
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(output(plain, inputs(plain)), output(llama(), inputs(plain)))
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")
        patch_model(model, "bigbird").save_pretrained(folder)
        assert (folder / "modeling_sa_hf.py").exists()


def test_carried_way_to_unpatch(saved):
    model = load(saved[1])
    assert model.unpatch_model() is model
    assert torch.equal(output(model, inputs(model)), output(llama(), inputs(model)))


def test_tied_weights_and_shards(tmp_path):
    model = patched()
    expected = output(model, inputs(model))
    model.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    shards = list((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 3
    keys = {key for shard in shards for key in load_file(shard)}
    assert "lm_head.weight" not in keys
    loaded = load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(output(loaded, inputs(model)), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
def test_dtype(tmp_path, saved, dtype):
    model, folder = saved
    loaded = load(folder, dtype=dtype)
    wanted = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    given = inputs(model)
    llama().save_pretrained(tmp_path / "dense")
    here = patch_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=wanted), PATTERN)
    assert torch.equal(output(loaded, given), output(here, given))
    loaded.save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").dtype == wanted


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(saved, device_map):
    model, folder = saved
    loaded = load(folder, device_map=device_map)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))


def test_offloaded_to_disk(tmp_path, saved):
    """Layers on disk run through Accelerate's hooks, and the dispatched model saves again."""
    model, folder = saved
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)}
    loaded = load(folder, device_map=places, offload_folder=tmp_path / "off")
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    loaded.save_pretrained(tmp_path / "m")
    assert torch.equal(output(load(tmp_path / "m"), inputs(model)), output(model, inputs(model)))


def test_generation_config(tmp_path):
    model = patched()
    model.generation_config.max_new_tokens = 7
    model.generation_config.do_sample = False
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert loaded.generation_config.max_new_tokens == 7
    ids = inputs(model)["input_ids"][:, :30]
    assert torch.equal(loaded.generate(ids), model.generate(ids))


def test_variant_and_state_dict_arguments(tmp_path):
    model = patched()
    given = inputs(model)
    state = {name: weight * 0 if "norm" in name else weight for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", True, state, variant="z")
    loaded = load(tmp_path / "m", variant="z")
    assert loaded.model.norm.weight.abs().sum() == 0
    assert output(loaded, given).abs().sum() == 0


def test_deepcopy_and_pickle(saved):
    model = load(saved[1])
    given = inputs(model)
    expected = output(model, given)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert other is not model
        assert torch.equal(output(other, given), expected)
        unpatch_model(other)
    assert torch.equal(output(model, given), expected)


def test_hidden_states_are_recorded(saved):
    model = load(saved[1])
    assert len(model(**inputs(model), output_hidden_states=True).hidden_states) == 4


def test_repatching_a_loaded_model(tmp_path, saved):
    model = patch_model(load(saved[1]), WINDOW)
    expected = output(patch_model(llama(), WINDOW), inputs(model))
    assert torch.equal(output(model, inputs(model)), expected)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(output(load(tmp_path / "m"), inputs(model)), expected)


def test_class_of_ones_own(tmp_path):
    """A user's subclass is in no Auto mapping: its sparse class loads it, and a plain load raises."""

    class Mine(type(llama())):
        pass

    model = patch_model(Mine(llama().config).eval(), WINDOW)
    model.save_pretrained(tmp_path / "m")
    assert config_of(tmp_path / "m")["architectures"] == ["Mine"]
    loaded = sparse_class(Mine).from_pretrained(tmp_path / "m")
    assert isinstance(loaded, Mine)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Mine.from_pretrained(tmp_path / "m")


def test_two_checkpoints_and_a_dense_model_in_one_process(tmp_path):
    """No state is shared: each load runs its own patterns."""
    given = inputs(llama())
    models = {w: patch_model(llama(), "sliding_window", window=w) for w in (2, 9)}
    for w, model in models.items():
        model.save_pretrained(tmp_path / f"w{w}")
    loaded = {w: load(tmp_path / f"w{w}") for w in models}
    plain = llama()
    for w, model in models.items():
        assert torch.equal(output(loaded[w], given), output(model, given))
    assert torch.equal(output(plain, given), output(llama(), given))
    assert not torch.equal(output(loaded[2], given), output(loaded[9], given))
