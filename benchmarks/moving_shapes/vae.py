"""The VAE of Wan2.1 over whole clips at once, for training: what its stages compute frame group by frame group, as one pass.

The layers and names are those of `export.modules.vae_layers`, whose modules hold the parameters here. Activations are [B, T, H, W, C]; a
convolution over time is one over three neighbouring frames' channels, which a GPU runs as a plain 2-D convolution. The first frame passes
no convolution that doubles or halves time, and what follows it does not see it there: the reference's chunk rules.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.modules.vae_layers import build_layer
from runtime.stages.vae_layers import Layer, LayerKind, decoder_layers, encoder_layers
from runtime.variants import VaeArch


class Vae(nn.Module):
    """Encoder and decoder with the parameters of the original checkpoint, under its names.

    Between training's latents (of mean 0 and deviation 1) and the checkpoint's there is an affine map of each channel, which
    `folded_state` puts into the convolutions on both sides.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, arch: VaeArch) -> None:
        super().__init__()
        self.arch = arch
        self.encode_chain, self.decode_chain = _Chain(encoder_layers(arch)), _Chain(decoder_layers(arch))
        self.register_buffer("mean", torch.zeros(arch.z_dim))
        self.register_buffer("std", torch.ones(arch.z_dim))
        for name, parameter in self.named_parameters():
            _initialise(name, parameter)

    def moments(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] in [-1, 1] → the posterior's mean before any normalisation, [B, z, t, h, w]."""
        return _run(self.encode_chain, frames.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames → latents as the transformer sees them, float32 [B, z, t, h, w]."""
        moments = self.moments(frames).float()
        return (moments - self.mean.view(-1, 1, 1, 1)) / self.std.view(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, z, t, h, w] → frames [B, 3, T, H, W] of about -1 to 1."""
        return _run(self.decode_chain, latents.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def take_statistics_of_wan(self) -> None:
        """Make `encode` and `decode` those of a loaded checkpoint, whose latents have the published mean and deviation.

        `decode` takes normalised latents, so the checkpoint's own un-normalising goes into `conv2`.
        """
        mean, std = (torch.tensor(row, device=self.mean.device) for row in (self.arch.latents_mean, self.arch.latents_std))
        self.mean.copy_(mean)
        self.std.copy_(std)
        conv = self.decode_chain.get_submodule("conv2")
        assert isinstance(conv, nn.Conv3d) and conv.bias is not None
        with torch.no_grad():
            conv.bias += conv.weight.flatten(1) @ mean
            conv.weight *= std.view(1, -1, 1, 1, 1)

    def folded_state(self) -> dict[str, Tensor]:
        """The tensors of the original checkpoint, whose latents have the mean and deviation that its kind is published with.

        With training's latent z = (m - mean) / std, the checkpoint's is m' = z · wan_std + wan_mean: both maps are affine in each channel,
        so rows of `conv1` and columns of `conv2`, between which nothing else lies, take them in exactly.
        """
        state = {**self.encode_chain.state_dict(), **self.decode_chain.state_dict()}
        state = {name: tensor.detach().double().cpu() for name, tensor in state.items()}
        z = self.arch.z_dim
        wan_mean, wan_std = (torch.tensor(row, dtype=torch.float64) for row in (self.arch.latents_mean, self.arch.latents_std))
        scale = wan_std / self.std.double().cpu()
        weight, bias = state["conv1.weight"].clone(), state["conv1.bias"].clone()
        weight[:z] *= scale.view(-1, 1, 1, 1, 1)
        bias[:z] = (bias[:z] - self.mean.double().cpu()) * scale + wan_mean
        weight[z:], bias[z:] = 0, torch.log((_POSTERIOR_STD * wan_std) ** 2)  # the log-variance, which nothing reads
        state["conv1.weight"], state["conv1.bias"] = weight, bias
        inner = state["conv2.weight"] / wan_std.view(1, -1, 1, 1, 1)
        state["conv2.bias"] = state["conv2.bias"] - inner.flatten(1) @ wan_mean
        state["conv2.weight"] = inner
        return {name: tensor.float() for name, tensor in state.items()}


_POSTERIOR_STD = 0.1


class _Chain(nn.Module):
    """Holds the layers' parameters; they carry the checkpoint's names because layers hang where their names say."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        super().__init__()
        self.layers = layers
        for layer in layers:
            *containers, leaf = layer.name.split(".")
            place: nn.Module = self
            for container in containers:
                if container not in dict(place.named_children()):
                    place.add_module(container, nn.Module())
                place = place.get_submodule(container)
            place.add_module(leaf, build_layer(layer, first=False))


def _initialise(name: str, parameter: nn.Parameter) -> None:
    with torch.no_grad():
        if name.endswith("gamma"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            gain = 0.3 if name.endswith(("residual.6.weight", "proj.weight")) else 1.0
            parameter.normal_(0, gain / math.sqrt(parameter[0].numel()))


def _run(chain: _Chain, x: Tensor) -> Tensor:
    for layer in chain.layers:
        x = _apply(layer, chain.get_submodule(layer.name), x)
    return x


def _apply(layer: Layer, module: nn.Module, x: Tensor) -> Tensor:
    match layer.kind:
        case LayerKind.POINTWISE:
            return _pointwise(x, module)
        case LayerKind.MEAN:
            return _pointwise(x, module)[..., : layer.out_channels]
        case LayerKind.CONV:
            return _causal(x, module)
        case LayerKind.HEAD:
            return _causal(_norm_silu(x, module["0"]), module["2"])  # type: ignore[index]  # a ModuleDict
        case LayerKind.RES_BLOCK:
            return _res_block(module, x)
        case LayerKind.ATTENTION:
            return _attention(module, x)
        case LayerKind.UPSAMPLE | LayerKind.UPSAMPLE_TIME:
            return _upsample(module, x, doubles_time=layer.kind is LayerKind.UPSAMPLE_TIME)
        case LayerKind.DOWNSAMPLE | LayerKind.DOWNSAMPLE_TIME:
            return _downsample(module, x, halves_time=layer.kind is LayerKind.DOWNSAMPLE_TIME)
        case _:
            raise ValueError(f"{layer.kind} is not a layer of Wan2.1's VAE")


def _res_block(block: nn.Module, x: Tensor) -> Tensor:
    residual = block.get_submodule("residual")
    hidden = _causal(_norm_silu(x, residual.get_submodule("0")), residual.get_submodule("2"))
    hidden = _causal(_norm_silu(hidden, residual.get_submodule("3")), residual.get_submodule("6"))
    shortcut = getattr(block, "shortcut", None)
    return hidden + (x if shortcut is None else _pointwise(x, shortcut))


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    batch, time, height, width, channels = x.shape
    qkv, proj = block.get_submodule("to_qkv"), block.get_submodule("proj")
    rows = _norm(x, block.get_submodule("norm")).view(batch * time, 1, height * width, channels)
    query, key, value = F.linear(rows, qkv.weight.flatten(1), qkv.bias).chunk(3, dim=-1)  # type: ignore[arg-type,operator]
    attended = F.scaled_dot_product_attention(query, key, value)
    return x + F.linear(attended, proj.weight.flatten(1), proj.bias).view(x.shape)  # type: ignore[arg-type,operator]


def _upsample(block: nn.Module, x: Tensor, *, doubles_time: bool) -> Tensor:
    if doubles_time:
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1]:
            pairs = _causal(rest, block.get_submodule("time_conv"))
            pairs = pairs.reshape(*rest.shape[:-1], 2, -1)
            rest = pairs.movedim(-2, 2).flatten(1, 2)  # [B, T, H, W, 2, C] → [B, 2T, H, W, C]
        x = torch.cat((first, rest), dim=1)
    batch, time, height, width, channels = x.shape
    doubled = x[:, :, :, None, :, None].expand(batch, time, height, 2, width, 2, channels)
    return _frame_conv(doubled.reshape(batch, time, 2 * height, 2 * width, channels), block.get_submodule("resample.1"))


def _downsample(block: nn.Module, x: Tensor, *, halves_time: bool) -> Tensor:
    x = _frame_conv(F.pad(x, (0, 0, 0, 1, 0, 1)), block.get_submodule("resample.1"), padding=0, stride=2)
    if not halves_time or x.shape[1] == 1:
        return x
    conv = block.get_submodule("time_conv")
    triples = torch.cat((x[:, :-2:2], x[:, 1:-1:2], x[:, 2::2]), dim=-1)
    return torch.cat((x[:, :1], F.linear(triples, _over_time(conv).flatten(1), conv.bias)), dim=1)  # type: ignore[arg-type]


def _causal(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution over the present and two past frames, the first ones' past being zeros."""
    past = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0))
    if x.device.type == "cpu":  # where three frames' channels side by side cost a quarter more
        return _conv3d(past, conv)
    time = x.shape[1]
    triples = torch.cat([past[:, offset : offset + time] for offset in range(3)], dim=-1)
    weight = _over_time(conv)
    return _conv2d(triples, weight, conv.bias, padding=weight.shape[-1] // 2, stride=1)  # type: ignore[arg-type]


def _conv3d(past: Tensor, conv: nn.Module) -> Tensor:
    weight = conv.weight
    assert isinstance(weight, Tensor)
    side = weight.shape[-1] // 2
    convolved = F.conv3d(past.permute(0, 4, 1, 2, 3), weight, conv.bias, padding=(0, side, side))  # type: ignore[arg-type]
    return convolved.permute(0, 2, 3, 4, 1)


def _over_time(conv: nn.Module) -> Tensor:
    """A kernel over three frames [O, C, 3, kh, kw] as one over three frames' channels, [O, 3·C, kh, kw]."""
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return weight.movedim(2, 1).flatten(1, 2)


def _frame_conv(x: Tensor, conv: nn.Module, *, padding: int = 1, stride: int = 1) -> Tensor:
    return _conv2d(x, conv.weight, conv.bias, padding=padding, stride=stride)  # type: ignore[arg-type]


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, padding: int, stride: int) -> Tensor:
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B·T, C, H, W], channels last in memory
    convolved = F.conv2d(frames, weight, bias, stride=stride, padding=padding).permute(0, 2, 3, 1)
    return convolved.reshape(*x.shape[:2], *convolved.shape[1:])


def _pointwise(x: Tensor, conv: nn.Module) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)  # type: ignore[arg-type,operator]


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    gamma = norm.gamma
    assert isinstance(gamma, Tensor)
    return F.rms_norm(x, (x.shape[-1],), gamma.flatten().to(x.dtype), eps=1e-12)


def _norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    return F.silu(_norm(x, norm))
