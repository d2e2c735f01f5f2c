"""The two data contracts: decoded images and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.checks import typed
from pipelines.runtime import InputError, invalid


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """N decoded RGB images of different sizes in one flat buffer, without padding.

    Attributes:
        pixels: uint8 [bytes], buffer of all images (row-major, height x width x RGB each).
        offset: int64 [N], byte offset of each image's first pixel.
        sizes: int64 [N, 2], (height, width) of each image in pixels. Always on the CPU.
        row_stride: int64 [N], bytes from one row to the next (3 * width unless the image is part of a wider canvas).
        index: int64 [N], dataset index of each image. Always on the CPU.
        labels: int64 [N], class of each image, -1 for none. Always on the CPU.
    """

    pixels: Tensor
    offset: Tensor
    sizes: Tensor
    row_stride: Tensor
    index: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.sizes.shape[0])

    @property
    def device(self) -> torch.device:
        """Device of the pixels."""
        return self.pixels.device

    def image(self, n: int) -> Tensor:
        """Image `n` as a uint8 [H, W, 3] view into the buffer (no copy)."""
        height, width = self.sizes[n].tolist()
        return self.pixels.as_strided((height, width, 3), (int(self.row_stride[n]), 3, 1), int(self.offset[n]))

    @classmethod
    @typed
    def packed(cls, pixels: Tensor, *, sizes: Tensor, index: Tensor, labels: Tensor | None = None) -> DecodedBatch:
        """Wrap a buffer of images without gaps.

        Args:
            pixels: uint8 [sum of 3 * height * width], on any device.
            sizes: int64 [N, 2], (height, width).
            index: int64 [N].
            labels: int64 [N]; None for unlabelled (-1).
        """
        sizes = sizes.to(dtype=torch.int64, device="cpu").reshape(-1, 2)
        nbytes = sizes.prod(dim=1) * 3  # [N]
        if pixels.dtype != torch.uint8 or pixels.dim() != 1 or pixels.numel() != int(nbytes.sum()):
            raise InputError(
                f"DecodedBatch.pixels is {pixels.dtype} {tuple(pixels.shape)} but must be uint8 [{int(nbytes.sum())}], "
                "3 bytes a pixel of the given sizes: pass the buffer that belongs to these sizes."
            )
        return cls(
            pixels=pixels,
            offset=nbytes.cumsum(0) - nbytes,
            sizes=sizes,
            row_stride=sizes[:, 1] * 3,
            index=index,
            labels=torch.full_like(index, -1) if labels is None else labels,
        )

    @classmethod
    @typed
    def from_images(
        cls,
        images: Sequence[np.ndarray | Tensor],
        *,
        index: Sequence[int],
        labels: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> DecodedBatch:
        """Pack images (uint8 [H, W, 3] each) into one batch; copies each image once."""
        flat: list[Tensor] = []
        sizes: list[tuple[int, int]] = []
        for n, image in enumerate(images):
            try:
                tensor = torch.as_tensor(image)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"images[{n}] is of type {type(image).__name__} but must be uint8 [height, width, 3]: convert it "
                    "with numpy.asarray."
                ) from error
            if tensor.dtype != torch.uint8 or tensor.dim() != 3 or tensor.shape[2] != 3 or tensor.numel() == 0:
                raise InputError(
                    f"images[{n}] is {tensor.dtype} {tuple(tensor.shape)} but must be uint8 [height, width, 3] with at "
                    "least one pixel: convert it to RGB first."
                )
            flat.append(tensor.reshape(-1))
            sizes.append((int(tensor.shape[0]), int(tensor.shape[1])))
        for name, values in (("index", index), ("labels", labels)):
            if values is not None and len(values) != len(sizes):
                raise InputError(f"{name} has {len(values)} entries for {len(sizes)} images: give one for each image.")
        return cls.packed(
            (torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)).to(as_device(device)),
            sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
            index=torch.as_tensor(index, dtype=torch.int64),
            labels=None if labels is None else torch.as_tensor(labels, dtype=torch.int64),
        )

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> DecodedBatch:
        """Copy the pixels to another device; sizes, index and labels stay on the CPU."""
        return DecodedBatch(
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            offset=self.offset,
            sizes=self.sizes,
            row_stride=self.row_stride,
            index=self.index,
            labels=self.labels,
        )


def check_batch(batch: DecodedBatch) -> None:
    """Raise InputError unless every image is non-empty and inside the pixel buffer."""
    count = len(batch)
    for name in ("offset", "row_stride", "index", "labels"):
        entries = len(getattr(batch, name))
        if entries != count:
            raise InputError(f"DecodedBatch.{name} has {entries} entries for {count} sizes: give one for each image.")
    height, width = batch.sizes.reshape(-1, 2).unbind(dim=1)  # [N]
    end = batch.offset + (height - 1) * batch.row_stride + 3 * width
    good = (height > 0) & (width > 0) & (batch.offset >= 0) & (batch.row_stride >= 3 * width)
    good &= end <= batch.pixels.numel()
    if not bool(good.all()):
        n = int((~good).nonzero()[0])
        raise InputError(
            f"DecodedBatch.sizes[{n}] is {batch.sizes[n].tolist()} with offset {int(batch.offset[n])} and row stride "
            f"{int(batch.row_stride[n])}, which does not lie inside the {batch.pixels.numel()} bytes of pixels: pass "
            "the sizes of the images that are in the buffer."
        )


@dataclass(frozen=True, kw_only=True)
class ViewBatch:
    """All views of N images, the input of the training step.

    Attributes:
        views: one tensor [N, 3, S, S] per view, in the order of the specs; channels-last, normalised, on the device.
        index: int64 [N] on the CPU, dataset index of each image.
        labels: int64 [N] on the CPU, -1 for none.
    """

    views: list[Tensor]
    index: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> ViewBatch:
        """The batch with its views on a device, as training frameworks ask for it; index and labels stay on the CPU."""
        views = [view.to(device, non_blocking=non_blocking) for view in self.views]
        return ViewBatch(views=views, index=self.index, labels=self.labels)


def as_device(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        InputError: torch does not know the name.
    """
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise invalid("device", device, "a device of torch", "give cpu, cuda or cuda:0") from error


def with_index(device: str | torch.device) -> torch.device:
    """Add the index of this thread's current device to "cuda"; the current device is per thread."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise invalid("device", device, "cpu, cuda or cuda:N", "choose one of these") from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
