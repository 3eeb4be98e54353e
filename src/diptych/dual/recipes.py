"""Recipes for dual encoders: ITO, CLIP, CLIP with ITO's augmentation, SigLIP and SLIP.

Tiny is for one CPU core, small for two or one small GPU, medium for one GPU of 24 GB; base and large are the paper's.
Frozen ones train heads on pretrained towers.
"""

import tyro

from diptych.data.augment import ViewConfig, whole_view
from diptych.dual.ito import FusionConfig, ItoConfig
from diptych.dual.model import DualEncoderConfig
from diptych.dual.objective import ClipConfig, SlipConfig
from diptych.dual.training import ClipRun, ItoRun, PairsData, SlipRun
from diptych.train.config import OptimConfig, TrainConfig

_CHUNK = 128
"""Rows of medium that are encoded at a time: ITO takes about 13 GB with them, SLIP 18 GB (computed)."""


def ito_tiny() -> ItoRun:
    """ITO for images of 64 pixels, on one CPU core.

    Departure from the paper: a step has two captions of each image (docs/log.md).

    Command: diptych fit ito-tiny --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/ito
    Cost: twenty minutes.
    Expected: mean R@1 2.5 %, R@10 14.1 % among Flickr8k's test images and captions (docs/results.md).
    """
    return ItoRun(**_tiny(), objective=ItoConfig(captions=2))


def ito_small() -> ItoRun:
    """ITO of 6M parameters for images of 96 pixels, on two CPU cores or one small GPU.

    A short --minutes trains towers as small as those of ito-tiny, whose steps cost a fifth. With few pairs, take
    ito-frozen.

    Departure from the paper: a step has two captions of each image, as in ito-tiny.

    Command: diptych fit ito-small --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/ito
    Cost: about two hours on two cores of an AMD EPYC with AVX2. This is an estimate: in a few steps on a busy machine a
          row took 53 ms of processor time.
    """
    return ItoRun(**_small(), objective=ItoConfig(captions=2))


def ito_medium() -> ItoRun:
    """ITO of 62M parameters for images of 224 pixels, ViT-S/16, for one GPU of 24 GB.

    The batch of 1,024 would take 93 GB at once, so 128 rows are encoded at a time, which gives the same gradient for a
    third more time. With more memory give a larger `--objective.chunk`.

    Command: diptych fit ito-medium --data.pairs 'shards/{000..099}.tar' --out runs/ito
    Cost: 99 TFLOP a step, computed from the sizes, and 13 GB of memory, by that of a row on a CPU (docs/results.md).
          50,000 steps are 21 hours if the GPU reaches 65 TFLOPS, 40 % of the 165 of an RTX 4090 in bf16. Not measured.
    """
    return ItoRun(**_medium(), objective=ItoConfig(chunk=_CHUNK))


def ito_base() -> ItoRun:
    """The paper's ITO with ViT-B/16, as on CC12M: about 30 epochs of 12 million pairs.

    Command: torchrun --nproc-per-node 8 -m diptych fit ito-base --data.pairs 'cc12m-{0000..1242}.tar' --out runs/ito
    Cost: days on eight GPUs. Not measured. Paper: 38.4 zero-shot over 26 sets, CLIP 34.1.
    """
    return ItoRun(**_base())


def ito_large() -> ItoRun:
    """ITO with ViT-L/16.

    Command: torchrun --nproc-per-node 8 -m diptych fit ito-large --data.pairs 'cc12m-{0000..1242}.tar' --out runs/ito
    Cost: weeks on eight GPUs. Not measured.
    """
    return ItoRun(**_large())


def clip_tiny() -> ClipRun:
    """CLIP beside `ito-tiny`: one weak view.

    Command: diptych fit clip-tiny --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/clip
    Cost: less than half of ito-tiny's. Expected: R@1 1.4 %, R@10 10.4 %.
    """
    return ClipRun(**_tiny())


def clip_small() -> ClipRun:
    """CLIP beside `ito-small`, in less than half of its time."""
    return ClipRun(**_small())


def clip_medium() -> ClipRun:
    """CLIP beside `ito-medium`, in about half of its time."""
    return ClipRun(**_medium(), objective=ClipConfig(chunk=_CHUNK))


def clip_base() -> ClipRun:
    """CLIP beside `ito-base`: ViT-B/16."""
    return ClipRun(**_base())


def clip_large() -> ClipRun:
    """CLIP beside `ito-large`: ViT-L/16."""
    return ClipRun(**_large())


def clip_aug_tiny() -> ClipRun:
    """CLIP with ITO's augmentation, beside `ito-tiny`: shows what the augmentation does without further views.

    Cost: as clip-tiny. Expected: R@1 1.2 %, R@10 9.1 %, less than clip-tiny's.
    """
    return _strong(clip_tiny())


def clip_aug_small() -> ClipRun:
    """CLIP with ITO's augmentation, beside `ito-small`."""
    return _strong(clip_small())


def clip_aug_medium() -> ClipRun:
    """CLIP with ITO's augmentation, beside `ito-medium`."""
    return _strong(clip_medium())


def clip_aug_base() -> ClipRun:
    """CLIP with ITO's augmentation, beside `ito-base`."""
    return _strong(clip_base())


def siglip_tiny() -> ClipRun:
    """SigLIP beside `ito-tiny`: CLIP with a separate loss for each combination of an image and a text.

    Cost: as clip-tiny. Expected: R@1 1.4 %, R@10 9.3 %.
    """
    return _sigmoid(clip_tiny())


def siglip_small() -> ClipRun:
    """SigLIP beside `ito-small`."""
    return _sigmoid(clip_small())


def siglip_medium() -> ClipRun:
    """SigLIP beside `ito-medium`."""
    return _sigmoid(clip_medium())


def siglip_base() -> ClipRun:
    """SigLIP beside `ito-base`."""
    return _sigmoid(clip_base())


def slip_tiny() -> SlipRun:
    """SLIP beside `ito-tiny`: CLIP on a weak view and SimCLR on two strong ones.

    Command: diptych fit slip-tiny --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/slip
    Cost: three quarters of ito-tiny's. Expected: R@1 2.3 %, R@10 13.7 %.
    """
    return SlipRun(**_tiny(), objective=SlipConfig(hidden=512, projected=128))


def slip_small() -> SlipRun:
    """SLIP beside `ito-small`."""
    return SlipRun(**_small(), objective=SlipConfig(hidden=768, projected=128))


def slip_medium() -> SlipRun:
    """SLIP beside `ito-medium`."""
    return SlipRun(**_medium(), objective=SlipConfig(chunk=_CHUNK))


def slip_base() -> SlipRun:
    """SLIP beside `ito-base`."""
    return SlipRun(**_base())


def ito_frozen() -> ItoRun:
    """ITO's heads on two frozen pretrained towers, whose features are computed once.

    Departures from the paper: the fusion has one block, as the states that it reads come from deep towers, and a step
    has two captions of each image.

    Command: diptych fit ito-frozen --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/ito
    Cost: features of 6,000 images and 30,000 captions, then 400 steps; minutes on two CPU cores.
    Expected: mean R@1 19.5 %, R@10 58.8 % among Flickr8k's test images and captions; less with --minutes 5.
    """
    config = ItoConfig(captions=2, augment=_crops(), fusion=FusionConfig(depth=1))
    return ItoRun(**_frozen(), objective=config)


def clip_frozen() -> ClipRun:
    """CLIP's heads on two frozen pretrained towers (LiT with both towers locked).

    Their features are computed once. `--model.image-tower` and `--model.text-tower` take any two pretrained models;
    `--model.tune text` or `all` trains towers too, at a lower `--optim.lr`.

    Command: diptych fit clip-frozen --data.pairs 'photos.tar?split=train' --data.valid 'photos.tar?split=dev'
             --out runs/clip
    Cost: features of 6,000 images and 30,000 captions, then 400 steps; minutes on two CPU cores.
    Expected: mean R@1 18.2 %, R@10 57.5 % among Flickr8k's test images and captions; 17.8 %, 55.8 % with --minutes 5.
    """
    return ClipRun(**_frozen(), objective=ClipConfig(augment=whole_view()))


def siglip_frozen() -> ClipRun:
    """SigLIP's heads on two frozen pretrained towers, beside `clip-frozen`."""
    return _sigmoid(clip_frozen())


def slip_frozen() -> SlipRun:
    """SLIP's heads on two frozen pretrained towers, beside `clip-frozen`."""
    config = SlipConfig(augment=whole_view(), strong=_crops(), hidden=512, projected=128)
    return SlipRun(**_frozen(), objective=config)


def _crops() -> ViewConfig:
    """Crops and mirror images. Changed colours would leave what the towers were trained on."""
    return ViewConfig(jitter=0.0, grey=0.0, blur=0.0)


def _frozen() -> dict:
    towers = DualEncoderConfig(
        image_tower="package:efficientnet-lite0", text_tower="package:minilm-l6", width=256, dropout=0.3
    )
    return _fields(
        towers,
        TrainConfig(steps=400, batch_size=256, eval_every=50, checkpoint_every=50, tensorboard=False),
        OptimConfig(lr=2e-3, warmup_steps=25, weight_decay=0.1),
    )


def _strong(run: ClipRun) -> ClipRun:
    run.objective.augment = ViewConfig()
    return run


def _sigmoid(run: ClipRun) -> ClipRun:
    run.objective.loss = "sigmoid"
    return run


def _tiny() -> dict:
    return _fields(
        DualEncoderConfig.tiny(),
        TrainConfig(steps=1800, batch_size=128, eval_every=180, checkpoint_every=180, tensorboard=False, workers=1),
        OptimConfig(lr=1e-3, warmup_steps=100, weight_decay=0.2),
    )


def _small() -> dict:
    return _fields(
        DualEncoderConfig.small(),
        TrainConfig(steps=1800, batch_size=128, eval_every=180, checkpoint_every=180, tensorboard=False, workers=1),
        OptimConfig(lr=1e-3, warmup_steps=100, weight_decay=0.2),
    )


def _medium() -> dict:
    return _fields(
        DualEncoderConfig.vit_s_16(),
        TrainConfig(steps=50_000, batch_size=1024, workers=12),
        OptimConfig(lr=1e-3, warmup_steps=2000, weight_decay=0.1),
    )


def _base() -> dict:
    return _fields(
        DualEncoderConfig.vit_b_16(),
        TrainConfig(steps=160_000, batch_size=2048, workers=16),
        OptimConfig(lr=1e-3, warmup_steps=10_000, weight_decay=0.1),
    )


def _large() -> dict:
    return _base() | {"model": DualEncoderConfig.vit_l_16()}


def _fields(model: DualEncoderConfig, train: TrainConfig, optim: OptimConfig) -> dict:
    """The fields that all recipes share. Moments are CLIP's; gradients are not clipped, as in the paper."""
    optim.betas, optim.eps, optim.max_grad_norm = (0.9, 0.98), 1e-6, None
    return {"data": PairsData(pairs=tyro.MISSING), "model": model, "train": train, "optim": optim}
