"""timm's ResNets with BatchNorm, residual, ReLU and max-pooling fused into one function in compiled training."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from mvssl.models.batchnorm import ViewBatchNorm
from mvssl.models.small_resnets import SmallResNet


class _FusedBlock(nn.Module):
    """Mixin for residual blocks that replaces their forward in compiled training.

    Attributes:
        splits: whether to return the output twice: for the next block's first convolution and for its shortcut.
    """

    splits = False

    def forward(self, x: Any) -> Any:
        """Map [N, C, H, W]; the input is one tensor or the pair of a block that `splits`."""
        if not (self.training and torch.compiler.is_compiling()):
            return super().forward(x)
        first, second = x if isinstance(x, tuple) else (x, x)
        y, last_norm = self._before_last_norm(first)
        shortcut, shortcut_norm = _shortcut(self.downsample, second)
        outputs = last_norm.fused(y, relu=True, shortcut=shortcut, shortcut_norm=shortcut_norm, split=self.splits)
        return outputs if self.splits else outputs[0]

    def _before_last_norm(self, x: Tensor) -> tuple[Tensor, ViewBatchNorm]:
        """The input of the block's last norm, and this norm."""
        raise NotImplementedError


def _shortcut(downsample: Any, x: Tensor) -> tuple[Tensor, ViewBatchNorm | None]:
    """The shortcut before its final norm, and this norm, if it has one."""
    if downsample is None:
        return x, None
    layers: list[Any] = list(downsample) if isinstance(downsample, nn.Sequential) else [downsample]
    norm = layers[-1] if isinstance(layers[-1], ViewBatchNorm) else None
    for layer in layers if norm is None else layers[:-1]:
        x = layer(x)
    return x, norm


class FusedBasicBlock(_FusedBlock, BasicBlock):
    """Two convolutions."""

    def _before_last_norm(self: Any, x: Tensor) -> tuple[Tensor, ViewBatchNorm]:
        return self.conv2(self.aa(self.bn1.normalise(self.conv1(x), relu=True))), self.bn2


class FusedBottleneck(_FusedBlock, Bottleneck):
    """Three convolutions."""

    def _before_last_norm(self: Any, x: Tensor) -> tuple[Tensor, ViewBatchNorm]:
        x = self.bn1.normalise(self.conv1(x), relu=True)
        return self.conv3(self.aa(self.bn2.normalise(self.conv2(x), relu=True))), self.bn3


class _FusedStem(nn.Module):
    """Mixin for ResNets that replaces their stem in compiled training."""

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """Map [N, 3, H, W] to the last stage's [N, C, H', W']."""
        if not (self.training and torch.compiler.is_compiling()):
            original: Any = super()
            result: Tensor = original.forward_features(x)
            return result
        pool = _is_usual_pool(self.maxpool)
        split = (pool or isinstance(self.maxpool, nn.Identity)) and isinstance(self.layer1[0], _FusedBlock)
        outputs: Any = self.bn1.fused(self.conv1(x), relu=True, pool=pool, split=split)
        y: Any = outputs if split else outputs[0] if pool else self.maxpool(outputs[0])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            y = stage(y)
        features: Tensor = y
        return features


def _is_usual_pool(module: nn.Module) -> bool:
    """Whether this is the max-pooling that the kernels implement."""
    return isinstance(module, nn.MaxPool2d) and (
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
    ) == (3, 2, 1, 1, False)


class FusedResNet(_FusedStem, ResNet):
    """timm's ResNet."""


class FusedSmallResNet(_FusedStem, SmallResNet):
    """ResNet with a stem for small images."""


_BLOCKS: dict[type[nn.Module], type[_FusedBlock]] = {BasicBlock: FusedBasicBlock, Bottleneck: FusedBottleneck}
_NETWORKS: dict[type[nn.Module], type[_FusedStem]] = {ResNet: FusedResNet, SmallResNet: FusedSmallResNet}


def fuse_resnets(encoder: nn.Module) -> None:
    """Replace the classes of timm's ResNets and blocks in place, after `use_view_batchnorms`.

    Blocks with attention, stochastic depth, DropBlock, another norm or another activation stay as they are, and so do
    networks with activation checkpointing. Parameters, buffers and their names do not change.
    """
    for module in encoder.modules():
        block: Any = _BLOCKS.get(type(module))
        if block is not None and _is_plain(module):
            module.__class__ = block
    for module in encoder.modules():
        fused: Any = _NETWORKS.get(type(module))
        network: Any = module
        if not isinstance(module, ResNet) or network.grad_checkpointing:
            continue
        if fused is not None and isinstance(network.bn1, ViewBatchNorm) and type(network.act1) is nn.ReLU:
            network.__class__ = fused
        stages = (network.layer1, network.layer2, network.layer3, network.layer4)
        blocks = [block for stage in stages for block in stage]
        for block, following in pairwise(blocks):
            block.splits = isinstance(block, _FusedBlock) and isinstance(following, _FusedBlock)


def _is_plain(block: Any) -> bool:
    """Whether a block is only convolutions, our norms, ReLU and the residual."""
    norms = [module for name, module in block.named_children() if name.startswith("bn")]
    acts = [module for name, module in block.named_children() if name.startswith("act")]
    return (
        all(isinstance(norm, ViewBatchNorm) for norm in norms)
        and all(type(act) is nn.ReLU for act in acts)
        and isinstance(block.drop_block, nn.Identity)
        and block.se is None
        and block.drop_path is None
    )
