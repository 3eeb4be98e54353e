from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, CLIPTokenizer

from diptych.data.pixels import decode_files
from diptych.data.sources.decode import decode
from diptych.dual.model import DualEncoder, DualEncoderConfig, train_clip_tokenizer
from diptych.encoders.text import text_list
from diptych.errors import UserError

TEXTS = ["a dog runs over the green grass", "two children", "the dog and the children run", "grass"]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    config = DualEncoderConfig(
        image_size=16, patch=8, image_width=32, image_depth=2, max_text_len=12, text_width=24, text_depth=2, width=20
    )
    return DualEncoder.from_config(config, train_clip_tokenizer(TEXTS * 3, vocab_size=600, length=12), seed=0)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual") / "model"
    encoder.save_pretrained(folder)
    return folder


def test_any_tool_that_loads_clip_gets_the_same_embeddings(encoder, pixels, folder):
    """Towers, pixel preparation, tokenizer and pooling, all by transformers alone."""
    clip = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    images = list(pixels.permute(0, 2, 3, 1).numpy())
    inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        expected = clip(**inputs)
    torch.testing.assert_close(encoder.embed_images(pixels), expected.image_embeds)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), expected.text_embeds)
    assert torch.equal(encoder.embed_texts(TEXTS[0]), encoder.embed_texts(TEXTS[:1]))  # not a text for each character


def test_it_is_read_back_as_it_was(encoder, pixels, folder):
    again = DualEncoder.from_pretrained(folder)
    assert (again.image_size, again.max_text_len, again.width) == (16, 12, 20)
    torch.testing.assert_close(again.embed_images(pixels), encoder.embed_images(pixels), rtol=0, atol=0)
    torch.testing.assert_close(again.embed_texts(TEXTS), encoder.embed_texts(TEXTS), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16, 16), (40, 40), (40, 64)])
def test_pixels_are_prepared_as_the_processor_does(encoder, shape):
    """`decode` and our normalisation against the processor, which cuts a rectangle after the resize and not before."""
    smooth = np.linspace(0, 255, shape[0] * shape[1] * 3).reshape(*shape, 3).astype(np.uint8)
    theirs = encoder.processor.image_processor(smooth, return_tensors="pt")["pixel_values"][0]
    file = BytesIO()
    Image.fromarray(smooth).save(file, "PNG")
    ours = torch.from_numpy(decode(file.getvalue(), 16)).permute(2, 0, 1).float() / 255
    ours = (ours - encoder.mean_311) / encoder.std_311
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if shape[0] == shape[1] else 0.1)


def test_embeddings_have_length_one_and_padding_changes_nothing(encoder):
    together = encoder.embed_texts(TEXTS)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(torch.cat([encoder.embed_texts([text]) for text in TEXTS]), together)


def test_marks_in_a_text_are_letters_and_long_texts_end(encoder):
    ids, valid = encoder.tokenize(["grass <|endoftext|> dog", "dog " * 40])
    assert (ids == encoder.tokenizer.eos_token_id).logical_and(valid).sum(1).tolist() == [1, 1]
    assert ids.shape[1] == 12
    assert ids[1, -1] == encoder.tokenizer.eos_token_id
    assert encoder.ids(["grass", "two dogs"])[0] == encoder.tokenize(["grass"])[0][0].tolist()


def test_the_first_token_of_an_image_and_the_last_of_a_text_are_the_pooled_ones(encoder, pixels):
    images = encoder.encode_images(pixels.float() / 255, keep_tokens=True)
    assert images.tokens_BSD.shape == (3, 5, 20)
    torch.testing.assert_close(images.tokens_BSD[:, 0], images.pooled_BD)
    ids, valid = encoder.tokenize(TEXTS)
    texts = encoder.encode_texts(ids, valid, keep_tokens=True)
    ends = valid.sum(1) - 1
    torch.testing.assert_close(texts.tokens_BSD[range(4), ends], texts.pooled_BD)
    torch.testing.assert_close(encoder.clip.text_projection(texts.state_BW), texts.pooled_BD)


def test_bf16_is_near_fp32_forwards_and_backwards(encoder, pixels):
    """Autocast on a CPU uses an attention of its own, which is causal for texts."""
    ids, valid = encoder.tokenize(TEXTS)

    learnt = [encoder.clip.text_projection.weight, encoder.clip.visual_projection.weight]

    def gradients() -> list[torch.Tensor]:
        total = encoder.encode_images(pixels.float() / 255).pooled_BD.float().square().sum()
        total = total + encoder.encode_texts(ids, valid).pooled_BD.float().square().sum()
        return list(torch.autograd.grad(total, learnt))

    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients()
    for a, b in zip(near, exact, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_the_scale_starts_at_clips_and_is_held_at_100(encoder):
    assert encoder.scale.item() == pytest.approx(1 / 0.07, rel=1e-3)
    before = encoder.clip.logit_scale.detach().clone()
    try:
        nn.init.constant_(encoder.clip.logit_scale, 9.0)
        encoder.clamp_scale()
        assert encoder.scale.item() == pytest.approx(100, rel=1e-5)
    finally:
        encoder.clip.logit_scale.data.copy_(before)


@pytest.mark.parametrize(
    ("size", "words", "parameters"),
    [("vit_s_16", 384, 62_257_537), ("vit_b_16", 512, 149_620_737), ("vit_l_16", 768, 427_739_393)],
)
def test_parameter_counts(encoder, size, words, parameters):
    """ViT-B/16 has exactly as many as OpenAI's."""
    config = getattr(DualEncoderConfig, size)()
    with torch.device("meta"):
        built = DualEncoder.from_config(config, encoder.tokenizer, seed=0)
    smaller = (config.vocab_size - len(encoder.tokenizer)) * words
    assert sum(p.numel() for p in built.parameters()) + smaller == parameters


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone(encoder):
    config = DualEncoderConfig(
        image_size=16, patch=8, image_width=32, image_depth=2, max_text_len=12, text_width=24, text_depth=2, width=20
    )
    state = torch.random.get_rng_state()
    again = DualEncoder.from_config(config, encoder.tokenizer, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(again.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_no_clip_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"dual encoder .*nowhere") as caught:
        DualEncoder.from_pretrained(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="'t5' model"):
        DualEncoder.from_pretrained(tmp_path)


# Cheaper training


def gradients_and_bytes(model: DualEncoder, pixels: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Gradients of the image tower, and the size of all storages that the backward pass holds, each counted once."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        tensor = tensor.detach()
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model.encode_images(pixels.float() / 255).pooled_BD.float().square().sum()
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return list(torch.autograd.grad(total, list(model.clip.vision_model.encoder.parameters()))), held


def test_recomputed_activations_change_no_gradient(encoder, pixels, folder):
    """And what backward holds is smaller."""
    lean = DualEncoder.from_pretrained(folder)
    lean.recompute_image_activations()
    (wanted, plain_bytes), (found, lean_bytes) = (gradients_and_bytes(model, pixels) for model in (encoder, lean))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert lean_bytes < 0.95 * plain_bytes


def test_a_model_tuned_for_training_computes_the_same(encoder, pixels, folder, tmp_path):
    """Embeddings and gradients in fp32, and nearly in bf16, where backward holds less. It saves the same CLIP."""
    tuned = DualEncoder.from_pretrained(folder)
    tuned.tune_for_training()
    torch.testing.assert_close(tuned.embed_images(pixels), encoder.embed_images(pixels))
    assert torch.equal(tuned.embed_texts(TEXTS), encoder.embed_texts(TEXTS))
    (wanted, _), (found, _) = (gradients_and_bytes(model, pixels) for model in (encoder, tuned))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        (_, plain_bytes), (near, tuned_bytes) = (gradients_and_bytes(model, pixels) for model in (encoder, tuned))
    assert tuned_bytes < plain_bytes
    compared = [(a, b) for a, b in zip(near, wanted, strict=True) if b.norm() > 1e-5]
    assert len(compared) == len(wanted) - 2  # the gradients of the keys' biases are nothing but rounding
    assert all((a - b).norm() < 0.05 * b.norm() for a, b in compared)
    tuned.save_pretrained(tmp_path)
    saved, plain = (DualEncoder.from_pretrained(at).clip.state_dict() for at in (tmp_path, folder))
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], plain[name]) for name in plain)


# The text tokenizer

TOKENIZER_TEXTS = ["A dog runs over the green grass.", "Two children's toys", "the dog and the children run"] * 3


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "no texts: give one at least"), (["a", None], r"text 1 \(counted from 0\) is None, of the type NoneType")],
)
def test_what_is_no_text_is_told(texts, message):
    assert text_list("a") == ["a"]
    assert text_list(text for text in "ab") == ["a", "b"]
    with pytest.raises(UserError, match=message):
        text_list(texts)


def test_nothing_to_embed_is_told(encoder):
    with pytest.raises(UserError, match="no images to embed"):
        encoder.embed_images([])
    with pytest.raises(UserError, match="no texts"):
        encoder.embed_texts([])


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_clip_tokenizer(TOKENIZER_TEXTS, vocab_size=700, length=16)


def test_frequent_words_become_tokens_and_marks_enclose_a_text(tokenizer):
    ids = tokenizer("The DOG")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "the</w>", "dog</w>", "<|endoftext|>"]


def test_the_end_mark_is_the_highest_id_and_pads(tokenizer):
    """Old CLIP code finds the end of a text by the largest id."""
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == len(tokenizer) - 2


def test_any_text_can_be_spelled(tokenizer):
    text = "señor 漢字 🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.replace(" ", "")


def test_a_tokenizer_survives_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert isinstance(again, CLIPTokenizer)
    texts = [*TOKENIZER_TEXTS, "an unseen wörd"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.model_max_length == 16


def test_the_vocabulary_is_a_limit():
    full = train_clip_tokenizer(TOKENIZER_TEXTS, vocab_size=10_000, length=16)
    cut = train_clip_tokenizer(TOKENIZER_TEXTS, vocab_size=520, length=16)
    assert len(cut) == 520 < len(full)


def test_no_texts_and_no_room_are_refused():
    with pytest.raises(UserError, match="never repeat"):
        train_clip_tokenizer([], vocab_size=600, length=16)
    with pytest.raises(UserError, match=r"model\.vocab-size is 500.*at least 514"):
        train_clip_tokenizer(TOKENIZER_TEXTS, vocab_size=500, length=16)


def test_transformers_own_processor_sees_the_same_square(dual_encoder, tmp_path):
    """It neither turns images nor knows what lies behind transparency, and it cuts the square after it has resized."""
    dual_encoder.save_pretrained(tmp_path / "model")
    model = CLIPModel.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    draw = np.random.default_rng(0)
    photo = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(
        (140, 100), Image.Resampling.BICUBIC
    )
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=turned)
    see_through = photo.convert("RGBA")
    see_through.putalpha(Image.fromarray(draw.integers(0, 256, (4, 4), dtype=np.uint8)).resize(photo.size))
    see_through.save(tmp_path / "alpha.png")
    photo.save(tmp_path / "wide.png")

    def theirs(image):
        with torch.no_grad():
            found = model.get_image_features(**processor(images=image, return_tensors="pt")).pooler_output
        return F.normalize(found, dim=-1)[0]

    for file in sorted(tmp_path.glob("*.png")):
        ours = dual_encoder.embed_images(decode_files([file], size=dual_encoder.image_size))[0]
        image = ImageOps.exif_transpose(Image.open(file)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        seen = Image.fromarray(decode(file, dual_encoder.image_size))
        torch.testing.assert_close(ours, theirs(seen))
        assert ours @ theirs(ImageOps.fit(image, (min(image.size),) * 2)) >= 0.9999
        assert ours @ theirs(image) >= 0.99  # half a pixel of the small image at most
    assert ours.shape == (dual_encoder.width,)


def test_images_are_embedded_as_paths_pillow_images_and_arrays(dual_encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = [tmp_path / f"{i}.png" for i in range(3)]
    expected = dual_encoder.embed_images(decode_files(files, size=dual_encoder.image_size))
    for images in (files, list(pixels), pixels, [str(files[0]), Image.fromarray(pixels[1]), pixels[2]]):
        with torch.inference_mode():
            torch.testing.assert_close(dual_encoder.embed_images(images, batch_size=2), expected)
    torch.testing.assert_close(dual_encoder.embed_images(files[1]), expected[1:2])
