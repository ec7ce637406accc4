"""Attention of torchvision's and timm's models through our kernels: the same weights, keys and results.

A module keeps its parameters and becomes an instance of a subclass that computes the same from them
(`module.__class__ = ...`), so state dicts, `deepcopy`, optimizers and hooks do not notice. Where the kernel cannot run, or
is not known to be faster, the library's own method runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..ops.library import autocast_dtype
from ..ops.window_attention import Layout, known_faster, refusal, window_attention
from .map_attention import CBAM

MODES = ("proven", "on", "off")

# Swin V2's largest logit scale: 1 / 0.01 (Liu et al. 2022, section 3.2).
_MOST_LOG_SCALE = math.log(100.0)


def use_kernels(network: nn.Module, mode: str) -> int:
    """Let the attention modules of a network run through our kernels, in place.

    Args:
        network: any module; swapped are torchvision's Swin, Swin V2, ViT and MaxViT attention, and timm's Swin, Swin V2,
            ViT (DeiT), BEiT and MaxViT attention.
        mode: "proven": at sizes where a benchmark has shown the kernel to be faster, else as before; "on": always, and a
            `ConfigError` (C004) at the first call where that is impossible; "off": as the library does it.

    Returns:
        The number of modules that are swapped now.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    count = 0
    for module in network.modules():
        original = getattr(module, "_imgcls_original", None)
        if original is not None:
            module.__class__ = original
            del module._imgcls_original, module._imgcls_mode
        if isinstance(module, CBAM):
            module.kernels = mode
            count += mode != "off"
        if mode == "off":
            continue
        swapped = _twins().get(type(module))
        if swapped is not None:
            module._imgcls_original, module._imgcls_mode = type(module), mode  # type: ignore[assignment]
            module.__class__ = swapped
            count += 1
    return count


class _Twin:
    """What every swapped module has."""

    _imgcls_mode: str
    training: bool

    def _kernel_takes(
        self, qkv_of: tuple[int, int, int], like: Tensor, layout: Layout, why: str, bias: bool, cosine: bool = False
    ) -> bool:
        """Whether the kernel is to run on a qkv of (H, W, 3 * C); raises in mode "on" where it cannot.

        Args:
            qkv_of: sizes of one image of qkv.
            like: a tensor with the device of qkv, and its dtype unless autocast changes it.
            why: a reason of the module's own against the kernel, else "".
        """
        if not why:
            probe = torch.empty((0, *qkv_of), dtype=autocast_dtype(like) or like.dtype, device=like.device)
            why = refusal(probe, layout, bias, cosine) or ""
        if self._imgcls_mode == "on":
            if why:
                raise ConfigError("C004", f"no kernel for this attention: {why}", try_="--kernels auto")
            return True
        return not why and known_faster(like.device.type, layout, qkv_of[2] // (3 * layout.heads), bias)


def _dropping(module: Any, rate: float) -> str:
    return "it drops attention weights, which no kernel does" if rate and module.training else ""


def _padded(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) with zeros behind the last row and column, to multiples of the window."""
    down, right = -x.shape[1] % window[0], -x.shape[2] % window[1]
    return F.pad(x, (0, 0, 0, right, 0, down)) if down or right else x


# --- torchvision ------------------------------------------------------------------------------------------------------


def _torchvision_swin(base: type[nn.Module], cosine: bool) -> type[nn.Module]:
    class KernelShiftedWindowAttention(_Twin, base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[1:3]
            window = (int(self.window_size[0]), int(self.window_size[1]))
            ph, pw = height + -height % window[0], width + -width % window[1]
            # a window as large as the image is not shifted
            shift = (
                0 if window[0] >= ph else int(self.shift_size[0]),
                0 if window[1] >= pw else int(self.shift_size[1]),
            )
            why = _dropping(self, self.attention_dropout)
            layout = Layout(self.num_heads, window, shift)
            if not self._kernel_takes((ph, pw, self.qkv.out_features), x, layout, why, bias=True, cosine=cosine):
                return super().forward(x)
            weight_bias, scale = self.qkv.bias, None
            if cosine:
                scale = self.logit_scale.clamp(max=_MOST_LOG_SCALE).exp()
                if weight_bias is not None:  # a key bias would be no parameter of the paper's attention
                    q_bias, k_bias, v_bias = weight_bias.chunk(3)
                    weight_bias = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
            qkv = F.linear(_padded(x, window), self.qkv.weight, weight_bias)
            bias = self.get_relative_position_bias().squeeze(0)
            out = window_attention(qkv, self.num_heads, window, shift, bias=bias, head_scale=scale, kernel=True)
            out = F.dropout(self.proj(out), self.dropout, self.training)
            return out[:, :height, :width, :].contiguous()

    return KernelShiftedWindowAttention


def _torchvision_maxvit(base: type[nn.Module]) -> type[nn.Module]:
    class KernelRelativePositionalAttention(_Twin, base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            windows, tokens = x.shape[1:3]  # (B, windows, N, C): an image of one window a row
            layout = Layout(self.n_heads, (1, tokens))
            if not self._kernel_takes((windows, tokens, self.to_qkv.out_features), x, layout, "", bias=True):
                return super().forward(x)
            bias = self.get_relative_positional_bias().squeeze(0)
            out = window_attention(
                self.to_qkv(x), self.n_heads, (1, tokens), bias=bias, scale=self.scale_factor, kernel=True
            )
            return self.merge(out)

    return KernelRelativePositionalAttention


class KernelMultiheadAttention(_Twin, nn.MultiheadAttention):
    """torchvision's ViT calls it with one tensor as query, key and value, and asks for no weights."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked = {"key_padding_mask", "attn_mask", "is_causal"}
        plain = query is key and key is value and not args and not any(kwargs.get(name) for name in asked)
        plain = plain and kwargs.get("need_weights") is False and self.batch_first and query.dim() == 3
        plain = plain and self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn
        why = "" if plain else "its call is not plain self-attention"
        why = why or _dropping(self, self.dropout)
        tokens = query.shape[1] if query.dim() == 3 else 1
        layout = Layout(self.num_heads, (1, tokens))
        if not self._kernel_takes((1, tokens, 3 * self.embed_dim), query, layout, why, bias=False):
            return super().forward(query, key, value, *args, **kwargs)
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        out = window_attention(qkv.unsqueeze(1), self.num_heads, (1, tokens), kernel=True).squeeze(1)
        return self.out_proj(out), None


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_swin(base: type[nn.Module], cosine: bool) -> type[nn.Module]:
    class KernelSwinBlock(_Twin, base):  # type: ignore[misc, valid-type]
        def _attn(self, x: Tensor) -> Tensor:
            attn: Any = self.attn
            height, width = x.shape[1:3]
            window = (int(self.window_size[0]), int(self.window_size[1]))
            shift = (int(self.shift_size[0]), int(self.shift_size[1]))
            ph, pw = height + -height % window[0], width + -width % window[1]
            why = _dropping(attn, attn.attn_drop.p)
            layout = Layout(attn.num_heads, window, shift)
            if not self._kernel_takes((ph, pw, attn.qkv.out_features), x, layout, why, bias=True, cosine=cosine):
                return super()._attn(x)
            back = any(shift) and (ph, pw) != (height, width)
            if back:  # timm pads behind the shift, the kernel shifts behind the padding
                x = _padded(x.roll((-shift[0], -shift[1]), (1, 2)), window).roll(shift, (1, 2))
            else:
                x = _padded(x, window)
            qkv = _timm_cosine_qkv(attn, x) if cosine else attn.qkv(x)
            bias = _timm_cosine_bias(attn) if cosine else attn._get_rel_pos_bias().squeeze(0)
            scale = attn.logit_scale.clamp(max=_MOST_LOG_SCALE).exp() if cosine else None
            out = window_attention(qkv, attn.num_heads, window, shift, bias=bias, head_scale=scale, kernel=True)
            out = attn.proj_drop(attn.proj(out))
            if back:
                out = out.roll((-shift[0], -shift[1]), (1, 2))[:, :height, :width, :].roll(shift, (1, 2))
            return out[:, :height, :width, :].contiguous()

    return KernelSwinBlock


def _timm_cosine_qkv(attn: Any, x: Tensor) -> Tensor:
    if attn.q_bias is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv(x) + bias if attn.qkv_bias_separate else F.linear(x, attn.qkv.weight, bias)


def _timm_cosine_bias(attn: Any) -> Tensor:
    """(heads, N, N): 16 * sigmoid of the continuous position bias (Liu et al. 2022, section 3.3)."""
    tokens = attn.window_size[0] * attn.window_size[1]
    table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
    bias = table[attn.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
    return 16 * torch.sigmoid(bias)


def _timm_vit(base: type[nn.Module]) -> type[nn.Module]:
    class KernelAttention(_Twin, base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **more: Any) -> Tensor:
            plain = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
            why = "" if plain else "it normalises queries and keys"
            why = why or ("it has an attention mask" if attn_mask is not None or is_causal or more else "")
            why = why or _dropping(self, self.attn_drop.p)
            tokens = x.shape[1]
            layout = Layout(self.num_heads, (1, tokens), scale=self.scale)
            if not self._kernel_takes((1, tokens, self.qkv.out_features), x, layout, why, bias=False):
                return super().forward(x, attn_mask=attn_mask, is_causal=is_causal, **more)
            qkv = self.qkv(x).unsqueeze(1)
            out = window_attention(qkv, self.num_heads, (1, tokens), scale=self.scale, kernel=True).squeeze(1)
            out = self.norm(out)
            if getattr(self, "gate", None) is not None:
                out = out * self.gate(x).sigmoid()
            return self.proj_drop(self.proj(out))

    return KernelAttention


def _timm_beit(base: type[nn.Module]) -> type[nn.Module]:
    class KernelBeitAttention(_Twin, base):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
            tokens = x.shape[1]
            own = self.relative_position_bias_table is not None
            has_bias = own or shared_rel_pos_bias is not None
            layout = Layout(self.num_heads, (1, tokens), scale=self.scale)
            why = _dropping(self, self.attn_drop.p)
            if not self._kernel_takes((1, tokens, self.qkv.out_features), x, layout, why, bias=has_bias):
                return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
            bias = self._get_rel_pos_bias() if own else None
            if shared_rel_pos_bias is not None:
                bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
            qkv = _timm_cosine_qkv(self, x).unsqueeze(1)
            bias = None if bias is None else bias.reshape(self.num_heads, tokens, tokens)
            out = window_attention(qkv, self.num_heads, (1, tokens), bias=bias, scale=self.scale, kernel=True)
            return self.proj_drop(self.proj(out.squeeze(1)))

    return KernelBeitAttention


def _timm_maxvit(base: type[nn.Module]) -> type[nn.Module]:
    class KernelPartitionAttention(_Twin, base):  # type: ignore[misc, valid-type]
        def _partition_attn(self, x: Tensor) -> Tensor:
            attn: Any = self.attn
            height, width = x.shape[1:3]
            window = (int(self.partition_size[0]), int(self.partition_size[1]))
            grid = not self.partition_block
            layout = Layout(attn.num_heads, window, grid=grid, scale=attn.scale)
            why = _dropping(attn, attn.attn_drop.p)
            if attn.rel_pos is not None and not hasattr(attn.rel_pos, "get_bias"):
                why = why or f"{type(attn.rel_pos).__name__} gives no bias of its own"
            has_bias = attn.rel_pos is not None
            if not self._kernel_takes((height, width, attn.qkv.out_features), x, layout, why, bias=has_bias):
                return super()._partition_attn(x)
            weight, bias = attn.qkv.weight, attn.qkv.bias
            if attn.head_first:  # its rows are (heads, 3, D), the kernel's (3, heads, D)
                parts = (attn.num_heads, 3, attn.dim_head)
                weight = weight.unflatten(0, parts).transpose(0, 1).flatten(0, 2)
                bias = None if bias is None else bias.unflatten(0, parts).transpose(0, 1).flatten()
            qkv = F.linear(x, weight, bias)
            position = attn.rel_pos.get_bias().squeeze(0) if has_bias else None
            out = window_attention(qkv, attn.num_heads, window, bias=position, scale=attn.scale, grid=grid, kernel=True)
            return attn.proj_drop(attn.proj(out))

    return KernelPartitionAttention


@functools.cache
def _twins() -> dict[type, type[nn.Module]]:
    """Library class -> subclass with our kernels."""
    from timm.layers.attention import Attention
    from timm.models import beit, maxxvit, swin_transformer, swin_transformer_v2
    from torchvision.models import maxvit
    from torchvision.models import swin_transformer as tv_swin

    makers: list[tuple[type[nn.Module], Callable[[type[nn.Module]], type[nn.Module]]]] = [
        (tv_swin.ShiftedWindowAttention, lambda base: _torchvision_swin(base, cosine=False)),
        (tv_swin.ShiftedWindowAttentionV2, lambda base: _torchvision_swin(base, cosine=True)),
        (maxvit.RelativePositionalMultiHeadAttention, _torchvision_maxvit),
        (nn.MultiheadAttention, lambda base: KernelMultiheadAttention),
        (swin_transformer.SwinTransformerBlock, lambda base: _timm_swin(base, cosine=False)),
        (swin_transformer_v2.SwinTransformerV2Block, lambda base: _timm_swin(base, cosine=True)),
        (Attention, _timm_vit),
        (beit.Attention, _timm_beit),
        (maxxvit.PartitionAttentionCl, _timm_maxvit),
    ]
    return {base: make(base) for base, make in makers}
