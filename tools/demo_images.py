"""Synthetic images of the demo data set: a textured shape on a cluttered background.

A class is a pair (shape, texture). Everything else has the same distribution for every class: colours, background,
lighting, noise, image size, the object's position, angle and **area**, and the fraction of the object in its dark
colour. So neither the mean colour nor a colour histogram separates the classes: a network has to see shape and texture.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

SHAPES = ("disc", "star")
TEXTURES = ("striped", "dotted", "ringed", "rayed")

# Ordered so that the first two classes already differ in shape and in texture.
CLASSES: tuple[tuple[str, str], ...] = tuple(
    (SHAPES[(i + shift) % len(SHAPES)], TEXTURES[i]) for shift, i in product(range(len(SHAPES)), range(len(TEXTURES)))
)

Array = NDArray[np.float32]


def class_name(kind: int) -> str:
    """Folder name of class `kind`, e.g. ``striped-disc``."""
    shape, texture = CLASSES[kind]
    return f"{texture}-{shape}"


def rotated(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates ([H, W] each) in a frame rotated by `angle` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def shape_distance(shape: str, u: Array, v: Array) -> Array:
    """Distance [H, W] that is below 1 inside the shape, whose area is exactly pi.

    Args:
        shape: one of `SHAPES`.
        u, v: coordinates [H, W] in the shape's frame.
    """
    distance: Array
    area: float
    if shape == "disc":
        distance, area = np.sqrt(u * u + v * v), np.pi
    else:  # eight spikes with tips at radius 1; folded onto half a spike, the outline is one straight line
        half, inner = np.float32(np.pi / 8), 0.55  # angle from tip to notch, radius of the notch
        angle = np.arctan2(v, u) % (2 * half)
        angle = np.minimum(angle, 2 * half - angle)
        # The line through (1, 0) and the notch at `half`, in polar form.
        slope = (1 - inner * np.cos(half)) / (inner * np.sin(half))
        distance = np.sqrt(u * u + v * v) * (np.cos(angle) + np.float32(slope) * np.sin(angle))
        area = float(8 * inner * np.sin(half))
    return distance * np.float32(np.sqrt(area / np.pi))


def texture_field(texture: str, u: Array, v: Array) -> Array:
    """Field [H, W] whose upper level sets are the texture, with period 1 ("rayed": eight rays).

    Args:
        texture: one of `TEXTURES`.
        u, v: coordinates [H, W] in periods.
    """
    turn = np.float32(2 * np.pi)
    field: Array
    if texture == "striped":
        field = np.cos(turn * u)
    elif texture == "ringed":
        field = np.cos(turn * np.sqrt(u * u + v * v))
    elif texture == "rayed":
        field = np.cos(8 * np.arctan2(v, u))
    else:  # three plane waves 60 degrees apart peak on a hexagonal lattice
        half, high = np.float32(0.5), np.float32(np.sqrt(3) / 2)
        field = np.cos(turn * u) + np.cos(turn * (half * u + high * v)) + np.cos(turn * (half * u - high * v))
    return field


def colour_triple(rng: np.random.Generator) -> Array:
    """Three slightly tinted colours [3, 3], about 0 to 1: medium background, dark and light of the object."""
    levels = np.array([rng.uniform(0.4, 0.6), rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)])
    colours: Array = (levels[:, None] + rng.normal(0, 0.04, (3, 3))).astype(np.float32)
    return colours


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """Bilinear interpolation [height, width] of a `cells` x `cells` grid of normal noise."""
    grid = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    rows, columns = np.linspace(0, cells - 1e-3, height), np.linspace(0, cells - 1e-3, width)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top).astype(np.float32)[:, None], (columns - left).astype(np.float32)[None, :]
    lines = grid[top] * (1 - down) + grid[top + 1] * down  # [height, cells + 1]
    noise: Array = lines[:, left] * (1 - right) + lines[:, left + 1] * right
    return noise


def background(rng: np.random.Generator, colour: Array, x: Array, y: Array) -> Array:
    """Background [H, W, 3]: blotches around `colour`, with a few bars and spots."""
    height, width = x.shape
    blotches = smooth_noise(rng, height, width, int(rng.integers(2, 9)))
    image = colour + np.float32(0.05) * blotches[..., None] * rng.standard_normal(3, dtype=np.float32)
    for _ in range(int(rng.integers(2, 6))):
        along, across = rotated(x - rng.uniform(0, np.max(x)), y - rng.uniform(0, np.max(y)), rng.uniform(0, np.pi))
        length, breadth = rng.uniform(0.03, 0.25), rng.uniform(0.01, 0.06)
        inside = (np.abs(along) < length) & (np.abs(across) < breadth)
        image[inside] = (rng.uniform(0.3, 0.7) + rng.normal(0, 0.04, 3)).astype(np.float32)
    return image


def render_image(kind: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render one image, uint8 [H, W, 3] with a longer side of 80 to 200 pixels.

    Args:
        kind: class, an index into `CLASSES`.
        rng: random generator of everything but the class.
    """
    longest, ratio = rng.integers(80, 201), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    height = int(longest if ratio < 1 else round(longest / ratio))
    width = int(longest if ratio >= 1 else round(longest * ratio))
    short = min(height, width)
    # Pixel centres in units of the short side.
    y, x = (np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)) / np.float32(short)

    shape, texture = CLASSES[kind]
    colours = colour_triple(rng)
    image = background(rng, colours[0], x, y)

    radius = rng.uniform(0.32, 0.44)  # of a disc of the same area
    centre_x, centre_y = (rng.uniform(0.9 * radius, side / short - 0.9 * radius) for side in (width, height))
    u, v = rotated(x - centre_x, y - centre_y, rng.uniform(0, 2 * np.pi))
    distance = shape_distance(shape, u / radius, v / radius)
    cover = np.clip((1 - distance) * (radius * short) + 0.5, 0, 1)  # [H, W], with an edge of 1 px

    period = rng.uniform(0.2, 0.3)
    shift_u, shift_v = rng.uniform(-0.5, 0.5, 2) * radius
    s, t = rotated(u + shift_u, v + shift_v, rng.uniform(0, 2 * np.pi))
    field = texture_field(texture, s / period, t / period)
    # The level that gives the dark colour its fraction of this object, for any texture.
    level = np.quantile(field[cover > 0.5], 1 - rng.uniform(0.35, 0.5))
    dark = np.clip((field - level) * (period * short / 4) + 0.5, 0, 1)[..., None]  # [H, W, 1]
    object_ = colours[1] * dark + colours[2] * (1 - dark)
    image += cover[..., None] * (object_ - image)

    slope = rng.uniform(-0.2, 0.2, 2)
    image *= (1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5))[..., None].astype(np.float32)
    image += rng.uniform(0.0, 0.03) * rng.standard_normal(image.shape, dtype=np.float32)
    pixels: NDArray[np.uint8] = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels
