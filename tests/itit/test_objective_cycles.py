"""The cycles against the paper's definition written out densely."""

import torch

from diptych.itit.masking import Masking
from diptych.itit.objective import i2t2i_loss, reimagined, rewritten, shift, t2i2t_loss
from diptych.rng import StepRNG


def masking(model, rows, seen):
    hidden = torch.ones(rows, model.config.image_tokens, dtype=torch.bool)
    hidden[:, seen] = False
    return Masking(hidden, torch.arange(model.config.image_tokens).expand(rows, -1))


def dense_one_hot(logits):
    soft = logits.softmax(-1)
    return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]) + (soft - soft.detach())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, dense):
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-5)
    one, two = gradients(model, ours), gradients(model, dense)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-3, msg=name)


def test_t2i2t_equals_the_dense_definition(model, text_encoder, batch):
    texts, rng = batch["texts"], StepRNG(0, 0)
    features = text_encoder.features(texts.ids_BL, texts.valid_BL)
    pseudo = batch["images"].tokens_BN
    first, second = masking(model, 4, [0, 3, 5]), masking(model, 4, [1, 2, 3, 4])
    image = reimagined(model, pseudo, features, texts.valid_BL, first, gumbel=1.0, rng=rng)
    options = {"label_smoothing": 0.1, "encoder_grad_scale": 0.1}
    ours = t2i2t_loss(model, image, texts.ids_BL, texts.valid_BL, second, **options)

    with torch.no_grad():
        encoded = model.encode(
            model.embed_image(pseudo), hidden_BN=first.hidden_BN, features_BLF=features, valid_BL=texts.valid_BL
        )
    logits = model.image_logits(encoded, first.hidden_BN)
    noisy = logits + rng.gumbel("gumbel", *logits.shape)
    pseudo_hot = torch.nn.functional.one_hot(pseudo, model.config.codebook_size).float()
    one_hot = torch.where(first.hidden_BN[..., None], dense_one_hot(noisy), pseudo_hot)
    dense = t2i2t_loss(model, one_hot @ model.token_embedding.weight, texts.ids_BL, texts.valid_BL, second, **options)
    assert_same(model, ours, dense)


def test_i2t2i_equals_the_dense_definition(model, text_encoder, batch):
    tokens = batch["images"].tokens_BN
    pseudo, valid = batch["texts"].ids_BL, batch["texts"].valid_BL
    first, second = masking(model, 4, [0, 3, 5]), masking(model, 4, [1, 2, 3, 4])
    banned = torch.zeros(text_encoder.vocab_rows, dtype=torch.bool)
    banned[list(text_encoder.banned_ids)] = True
    features = rewritten(model, text_encoder, tokens, pseudo, valid, first, banned_V=banned)
    ours = i2t2i_loss(model, tokens, features, valid, second, label_smoothing=0.1)

    with torch.no_grad():
        prefix = model.encode(model.embed_image(tokens), hidden_BN=first.hidden_BN, keep_BK=first.keep_BK).image_BKD
    logits = model.text_logits(prefix, shift(pseudo)).masked_fill(banned, -torch.inf)
    embedded = dense_one_hot(logits) @ text_encoder.embedding.weight
    dense_features = text_encoder.features_from_embeddings(embedded, valid)
    dense = i2t2i_loss(model, tokens, dense_features, valid, second, label_smoothing=0.1)
    assert_same(model, ours, dense)


def test_what_was_visible_stays(model, text_encoder, batch):
    texts = batch["texts"]
    features = text_encoder.features(texts.ids_BL, texts.valid_BL)
    first = masking(model, 4, [0, 3, 5])
    image = reimagined(model, batch["images"].tokens_BN, features, texts.valid_BL, first, gumbel=1.0, rng=StepRNG(0, 0))
    expected = model.embed_image(batch["images"].tokens_BN)
    torch.testing.assert_close(image[:, [0, 3, 5]], expected[:, [0, 3, 5]])


def test_shift_begins_with_the_pad_id():
    assert shift(torch.tensor([[5, 6, 1], [7, 1, 0]])).tolist() == [[0, 5, 6], [0, 7, 1]]
