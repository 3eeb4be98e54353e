"""Read back by the rules of open_clip's own networks, written out here: it cannot be installed beside a CPU's torch."""

import copy
import html
import json
import unicodedata

import ftfy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small_towers import encoder_of
from transformers import AutoProcessor, AutoTokenizer

from diptych.dual.export import CONFIG, IMAGE_TOWER, SCALE, TEXT_TOWER, WEIGHTS, save_onnx, save_open_clip
from diptych.encoders.text import clean_for_clip
from diptych.errors import UserError

TEXTS = ["a dog runs over the green grass", "two children", "grass " * 40]


@pytest.fixture
def encoder(dual_encoder):
    """With biases that are not zero and norms that are not one, as they are at the start."""
    encoder = copy.deepcopy(dual_encoder)
    torch.manual_seed(0)
    for weight in encoder.clip.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return encoder


@pytest.fixture
def folder(encoder, tmp_path):
    save_open_clip(encoder, tmp_path / "out")
    return tmp_path / "out"


def test_images_are_embedded_alike(encoder, folder):
    state, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
    model, pixels = config["model_cfg"], config["preprocess_cfg"]
    size = encoder.image_size
    assert model["vision_cfg"]["image_size"] == size
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    mean, std = (torch.tensor(pixels[name])[:, None, None] for name in ("mean", "std"))
    patch = model["vision_cfg"]["patch_size"]
    grid = F.conv2d((images / 255 - mean) / std, state["visual.conv1.weight"], stride=patch)
    tokens = grid.flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(3, 1, -1)
    x = torch.cat([first, tokens], dim=1) + state["visual.positional_embedding"]
    heads = model["vision_cfg"]["width"] // model["vision_cfg"]["head_width"]
    x = transform(norm(x, state, "visual.ln_pre"), state, "visual.transformer", model["vision_cfg"], heads, mask=None)
    found = norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]
    assert found.shape == (3, model["embed_dim"])
    torch.testing.assert_close(F.normalize(found, dim=-1), encoder.embed_images(images))


def test_texts_are_embedded_alike(encoder, folder):
    state, model = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())["model_cfg"]
    config = model["text_cfg"]
    length = config["context_length"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tokenizer(TEXTS, return_tensors="pt", max_length=length, padding="max_length", truncation=True)
    ids = told.input_ids
    assert ids.shape == (3, length)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    later = torch.full((length, length), -torch.inf).triu(1)
    x = norm(transform(x, state, "transformer", config, config["heads"], mask=later), state, "ln_final")
    end = (ids == config["eos_id"]).int().argmax(1)
    found = x[torch.arange(3), end] @ state["text_projection"]
    torch.testing.assert_close(F.normalize(found, dim=-1), encoder.embed_texts(TEXTS))
    assert state["logit_scale"].exp() == encoder.scale


HARD = [
    "there\u2019s a red circle",
    "a \u201cred\u201d circle",
    "a red &amp; blue circle, 3 &lt; 4 &amp;amp; more",
    "a re\ufb01ned red circle",
    "a \uff52\uff45\uff44 circle",
    "a red circle \U0001f534 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    unicodedata.normalize("NFC", "a café in Zürich"),
    unicodedata.normalize("NFD", "a café in Zürich"),
    "A RED Circle",
    "a red\ncircle\r\non  a\ttable\u2028again",
    "a cafÃ© that was decoded twice wrongly",
    "an é that is &eacute;, and a dash \u2013 or \u2014 and \u2026",
    "\u00a0a red\u00a0circle\u3000here\ufeff",
    "<b>a red circle</b> &amp; a dog",
    "\x1b[36;44ma red\x07 circle",
    "",
]


def as_open_clip(text):
    """The `clean="whitespace"` of open_clip's HFTokenizer."""
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return " ".join(text.split()).strip()


def test_hard_texts_are_embedded_alike(encoder, folder):
    config = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    clean = [as_open_clip(text) for text in HARD]
    told = tokenizer(
        clean, return_tensors="pt", max_length=config["context_length"], padding="max_length", truncation=True
    )
    with torch.no_grad():
        theirs = encoder.encode_texts(told.input_ids, told.attention_mask.bool()).pooled_BD
    cosine = (F.normalize(theirs, dim=-1) * encoder.embed_texts(HARD)).sum(1)
    assert cosine.min() >= 0.9999
    raw = encoder.ids(HARD)
    assert raw[0] == encoder.ids(["there's a red circle"])[0]
    assert raw[4] == raw[8] == encoder.ids(["a red circle"])[0]
    assert raw[6] == raw[7]
    plain = ["".join(map(chr, row)) for row in torch.randint(32, 127, (200, 20)).tolist()]
    assert [clean_for_clip(text) for text in plain] == [as_open_clip(text) for text in plain]


def test_every_weight_is_there_once(encoder, folder):
    state = load_file(folder / WEIGHTS)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in encoder.clip.parameters())


def test_an_activation_of_one_tower_alone_is_refused(encoder, tmp_path):
    encoder.clip.config.text_config.hidden_act = "quick_gelu"
    with pytest.raises(UserError, match="gelu, quick_gelu"):
        save_open_clip(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ONNX


@pytest.fixture
def runtime():
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["new", "pretrained"])
def test_onnx_gives_the_same_embeddings(kind, encoder, towers, runtime, tmp_path):
    encoder = encoder if kind == "new" else encoder_of(towers)
    assert save_onnx(encoder, tmp_path / "out") < 1e-5
    assert not list(tmp_path.glob(".*"))
    texts = [*TEXTS, "a dog"]
    images = torch.randint(256, (4, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(images=list(images), return_tensors="np")["pixel_values"]
    tokens = processor(text=texts, padding=True, truncation=True, return_tensors="np")
    found = {}
    for file, given in ((IMAGE_TOWER, {"pixel_values": pixels}), (TEXT_TOWER, tokens)):
        session = runtime.InferenceSession(tmp_path / "out" / file)
        names = [each.name for each in session.get_inputs()]
        (found[file],) = session.run(None, {name: given[name] for name in names})
    torch.testing.assert_close(torch.from_numpy(found[IMAGE_TOWER]), encoder.embed_images(images), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.from_numpy(found[TEXT_TOWER]), encoder.embed_texts(texts), atol=1e-4, rtol=0)
    assert json.loads((tmp_path / "out" / SCALE).read_text())["scale"] == encoder.scale.item()


@pytest.mark.slow
def test_onnx_that_differs_is_not_written(encoder, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.dual.export.LARGEST_DIFFERENCE", 0.0)
    with pytest.raises(UserError, match="differ from those of torch"):
        save_onnx(encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def transform(x, state, name, config, heads, *, mask):
    for number in range(config["layers"]):
        block = f"{name}.resblocks.{number}"
        attention = torch.nn.MultiheadAttention(config["width"], heads, batch_first=True)
        own = f"{block}.attn."
        attention.load_state_dict({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})
        y = norm(x, state, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.linear(
            norm(x, state, f"{block}.ln_2"), *(state[f"{block}.mlp.c_fc.{part}"] for part in ("weight", "bias"))
        )
        assert y.shape[-1] == config["mlp_ratio"] * config["width"]
        x = x + F.linear(F.gelu(y), *(state[f"{block}.mlp.c_proj.{part}"] for part in ("weight", "bias")))
    return x
