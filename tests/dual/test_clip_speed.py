import torch

from diptych.dual.clip_speed import forget_activations
from diptych.dual.model import DualEncoder


def test_forgotten_activations_change_no_gradient(dual_encoder, tmp_path):
    """And what backward holds is smaller."""
    dual_encoder.save_pretrained(tmp_path)
    lean = DualEncoder.from_pretrained(tmp_path)
    forget_activations(lean.clip)
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def gradients_and_bytes(model) -> tuple[list[torch.Tensor], int]:
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor):
            tensor = tensor.detach()
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = model.encode_images(pixels.float() / 255).pooled_BD.square().sum()
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return list(torch.autograd.grad(total, list(model.clip.vision_model.encoder.parameters()))), held

    (wanted, plain_bytes), (found, lean_bytes) = gradients_and_bytes(dual_encoder), gradients_and_bytes(lean)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert lean_bytes < 0.95 * plain_bytes
