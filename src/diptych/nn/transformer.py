"""The pre-norm transformer block of all networks of Diptych, and its key-value cache.

Shapes: B rows, S positions, W of them that are wanted, D width, H heads, E width of one head, T positions that may be
looked at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

_MANY = 96  # number of positions from which softmax in bf16 is faster than in fp32


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, [B H T E], allocated once for ``T`` positions and filled from the left."""

    keys_BHTE: Tensor
    values_BHTE: Tensor
    length: int = 0

    @classmethod
    def empty(cls, like: Tensor, *, heads: int, positions: int) -> "LayerCache":
        shape = (len(like), heads, positions, like.shape[-1] // heads)
        return cls(like.new_empty(shape), like.new_empty(shape))

    def append(self, keys_BHSE: Tensor, values_BHSE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions; return all that are filled."""
        end = self.length + keys_BHSE.shape[2]
        self.keys_BHTE[:, :, self.length : end] = keys_BHSE
        self.values_BHTE[:, :, self.length : end] = values_BHSE
        self.length = end
        return self.keys_BHTE[:, :, :end], self.values_BHTE[:, :, :end]

    def keep(self, rows_B: Int[Tensor, "B"]) -> None:
        """Go on with these rows only."""
        self.keys_BHTE, self.values_BHTE = self.keys_BHTE[rows_B], self.values_BHTE[rows_B]


def attention(
    q_BHSE: Tensor,
    k_BHTE: Tensor,
    v_BHTE: Tensor,
    *,
    attend: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k' / sqrt(E)) v. ``attend`` is True where a position may look; ``causal`` lets none look after itself.

    In bf16 on a CPU the products are written out, because torch's fused kernel has a slow backward pass there: forward
    and backward it takes 1.6 (170 positions) to 5 times (20 positions) as long, as `benchmarks/peers.py` shows.
    """
    if q_BHSE.device.type != "cpu" or q_BHSE.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            q_BHSE, k_BHTE, v_BHTE, attn_mask=attend, dropout_p=dropout, is_causal=causal
        )
    scores_BHST = (q_BHSE * q_BHSE.shape[-1] ** -0.5) @ k_BHTE.transpose(-1, -2)
    if causal:
        attend = torch.ones(scores_BHST.shape[-2:], dtype=torch.bool).tril()
    if attend is not None:  # adding takes a quarter of the time of masked_fill
        scores_BHST = scores_BHST + scores_BHST.new_zeros(attend.shape).masked_fill_(~attend, -torch.inf)
    weights_BHST = softmax(scores_BHST)
    return F.dropout(weights_BHST, dropout, training=dropout > 0) @ v_BHTE


def softmax(scores_XT: Tensor) -> Tensor:
    """Softmax over the last axis, summed in fp32; the result has the type of ``scores_XT``.

    Autocast alone would keep an fp32 result for the backward pass, three times the memory of bf16. Over few positions
    that is still faster on a CPU.
    """
    if scores_XT.shape[-1] < _MANY:
        return scores_XT.softmax(-1, dtype=torch.float32).to(scores_XT.dtype)
    with torch.autocast(scores_XT.device.type, enabled=False):
        return scores_XT.softmax(-1)


def rounded(x: Tensor) -> Tensor:
    """``x`` in the type that autocast gives to products. Used before several products of the same tensor, each of which
    would otherwise round, and keep, a copy of its own."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


Wanted = slice | Int[Tensor, "B W"]
"""Some of the positions: the same ones of all rows, or those of each row by their numbers."""


def positions_of(x_BSD: Shaped[Tensor, "B S D"], wanted: Wanted) -> Shaped[Tensor, "B W D"]:
    """What ``x_BSD`` has at the positions, or other entries of its second axis, that are wanted."""
    if isinstance(wanted, slice):
        return x_BSD[:, wanted]
    return x_BSD.gather(1, wanted[..., None].expand(-1, -1, x_BSD.shape[-1]))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017)."""

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} cannot be cut into {heads} heads: make it a multiple")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x_BSD: Tensor,
        *,
        attend: Tensor | None = None,
        cache: LayerCache | None = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        if wanted is None:
            q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q = self._part_of_qkv(positions_of(x_BSD, wanted), slice(None, x_BSD.shape[-1]))
            q, (k, v) = q.unflatten(-1, (self.heads, -1)).transpose(1, 2), self._keys_values(x_BSD)
            if attend is not None and attend.shape[-2] > 1:
                assert isinstance(wanted, slice), "other positions of each row need a mask that is the same for all"
                attend = attend[..., wanted, :]
        if cache is not None:
            k, v = cache.append(k, v)
        mixed_BHSE = attention(q, k, v, attend=attend, dropout=self.dropout if self.training else 0.0)
        return self.out(mixed_BHSE.transpose(1, 2).flatten(2))

    def remember(self, x_BSD: Tensor, cache: LayerCache) -> None:
        """Store the keys and values of ``x_BSD``, and compute nothing else."""
        cache.append(*self._keys_values(x_BSD))

    def _keys_values(self, x_BSD: Tensor) -> Tensor:
        """[2 B H S E]"""
        both = self._part_of_qkv(x_BSD, slice(x_BSD.shape[-1], None))
        return both.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _part_of_qkv(self, x_BSD: Tensor, outputs: slice) -> Tensor:
        """Some of the outputs of the layer of queries, keys and values."""
        if isinstance(self.qkv, nn.Linear):
            return F.linear(x_BSD, self.qkv.weight[outputs], self.qkv.bias[outputs])
        return self.qkv.part(x_BSD, outputs)  # rounded, packed or of 8 bits


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); a GELU in the mlp, dropout on both branches."""

    def __init__(self, width: int, *, heads: int, dropout: float = 0.0, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, dropout=dropout)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BSD: Float[Tensor, "B S D"],
        *,
        attend: Bool[Tensor, "*#broadcast S T"] | Bool[Tensor, "*#broadcast 1 T"] | None = None,
        cache: LayerCache | None = None,
        wanted: Wanted | None = None,
    ) -> Float[Tensor, "B W D"]:
        """``attend`` is True where a position may look; None lets it look everywhere. ``wanted`` are the positions
        that are computed and returned, while all are looked at; None: all."""
        mixed = self.attention(self.norm_attention(x_BSD), attend=attend, cache=cache, wanted=wanted)
        if wanted is not None:
            x_BSD = positions_of(x_BSD, wanted)
        x_BSD = x_BSD + self.dropout(mixed)
        return x_BSD + self.dropout(self.mlp(self.norm_mlp(x_BSD)))


class Blocks(nn.Module):
    """A stack of blocks and the closing LayerNorm."""

    def __init__(self, depth: int, width: int, *, heads: int, dropout: float = 0.0, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList(
            Block(width, heads=heads, dropout=dropout, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x_BSD: Tensor,
        *,
        attend: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """``wanted`` are the positions that are returned; the last block computes no others. None: all."""
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if cache is None:
                x_BSD = layer(x_BSD, attend=attend, wanted=wanted if index == last else None)
            else:  # `forward` is never compiled: `layer(...)` would be compiled anew for each length of the cache
                x_BSD = layer.forward(x_BSD, attend=attend, cache=cache[index])
        return self.norm(x_BSD)

    def read(self, x_BSD: Tensor, *, cache: list[LayerCache]) -> None:
        """Fill the cache with positions whose own output nobody needs, such as those of a prefix."""
        *layers, last = self.layers
        for layer, kept in zip(layers, cache, strict=False):
            x_BSD = layer.forward(x_BSD, cache=kept)
        assert isinstance(last, Block)
        last.attention.remember(last.norm_attention(x_BSD), cache[-1])

    def empty_cache(self, like: Tensor, *, positions: int) -> list[LayerCache]:
        """One cache a layer for rows and dtype ``like`` [B ... D]."""
        return [LayerCache.empty(like, heads=self.heads, positions=positions) for _ in self.layers]


def prefix_causal(prefix: int, length: int, *, device: torch.device | None = None) -> Bool[Tensor, "S S"]:
    """GIT's attention: the prefix sees itself; each later position sees the prefix, itself and what is before it."""
    total = prefix + length
    attend_SS = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    attend_SS[:prefix, :prefix] = True
    return attend_SS


def init_weights(module: nn.Module) -> None:
    """Linear and embedding weights: normal, std 0.02, cut at two std. Biases 0, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def init_fan_in(module: nn.Module) -> None:
    """Linear weights: normal, std 1/sqrt(inputs); the outputs of a block's two branches at half of that. Embeddings:
    normal, std 0.1. Biases 0, LayerNorm 1 and 0.

    At widths of about 2,500 this is what ``init_weights`` does. At a width of 128 the fixed std of 0.02 shrinks the
    signal to a quarter in every layer, which costs a short run most of its steps.
    """
    init_weights(module)
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.1)
    if isinstance(module, Block):
        with torch.no_grad():
            for branch_output in (module.attention.out, module.mlp[2]):
                assert isinstance(branch_output, nn.Linear)
                branch_output.weight.mul_(0.5)  # `apply` visits children first
