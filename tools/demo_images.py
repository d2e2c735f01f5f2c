"""One drawn picture of the demo data set: a textured shape before a cluttered ground.

A class is a pair (shape, texture). All else is drawn alike for every class: colours, ground, lighting, noise, picture
size, and the object's place, angle and **area**; also the share of the object that has its first colour. So neither the
mean colour nor a colour histogram tells the classes apart: a network has to see shape and texture.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

SHAPES = ("disc", "star")
TEXTURES = ("striped", "dotted", "ringed", "rayed")

# In this order the first classes already need both shape and texture.
CLASSES: tuple[tuple[str, str], ...] = tuple(
    (SHAPES[(i + shift) % len(SHAPES)], TEXTURES[i]) for shift, i in product(range(len(SHAPES)), range(len(TEXTURES)))
)

Array = NDArray[np.float32]


def class_name(kind: int) -> str:
    """Name of class `kind` as its folder is called, e.g. ``striped-disc``."""
    shape, texture = CLASSES[kind]
    return f"{texture}-{shape}"


def rotated(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates ([H, W] each) in a frame turned by `angle` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def gauge(shape: str, u: Array, v: Array) -> Array:
    """Distance measure [H, W] that is below 1 inside the shape; the shape covers an area of exactly pi.

    Args:
        shape: one of `SHAPES`.
        u: first coordinate [H, W] in the shape's own frame.
        v: second coordinate [H, W].
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


def wave(texture: str, u: Array, v: Array) -> Array:
    """Field [H, W] whose upper level sets are the texture; its period is 1, but for the rays, which are eight.

    Args:
        texture: one of `TEXTURES`.
        u: first coordinate [H, W] in periods.
        v: second coordinate [H, W] in periods.
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
    """Three slightly tinted colours [3, 3], about 0 to 1: the middling ground, the object's dark and its light one."""
    levels = np.array([rng.uniform(0.4, 0.6), rng.uniform(0.0, 0.2), rng.uniform(0.8, 1.0)])
    colours: Array = (levels[:, None] + rng.normal(0, 0.04, (3, 3))).astype(np.float32)
    return colours


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """Bilinear interpolation [height, width] of a `cells` x `cells` grid of normal numbers."""
    grid = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    rows, columns = np.linspace(0, cells - 1e-3, height), np.linspace(0, cells - 1e-3, width)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top).astype(np.float32)[:, None], (columns - left).astype(np.float32)[None, :]
    lines = grid[top] * (1 - down) + grid[top + 1] * down  # [height, cells + 1]
    noise: Array = lines[:, left] * (1 - right) + lines[:, left + 1] * right
    return noise


def ground(rng: np.random.Generator, colour: Array, x: Array, y: Array) -> Array:
    """The picture [H, W, 3] behind the object: blotches around `colour` with a few bars and spots across."""
    height, width = x.shape
    blotches = smooth_noise(rng, height, width, int(rng.integers(2, 9)))
    picture = colour + np.float32(0.05) * blotches[..., None] * rng.standard_normal(3, dtype=np.float32)
    for _ in range(int(rng.integers(2, 6))):
        along, across = rotated(x - rng.uniform(0, np.max(x)), y - rng.uniform(0, np.max(y)), rng.uniform(0, np.pi))
        length, breadth = rng.uniform(0.03, 0.25), rng.uniform(0.01, 0.06)
        inside = (np.abs(along) < length) & (np.abs(across) < breadth)
        picture[inside] = (rng.uniform(0.3, 0.7) + rng.normal(0, 0.04, 3)).astype(np.float32)
    return picture


def draw_image(kind: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one picture, uint8 [H, W, 3] with a longer side of 80 to 200 pixels.

    Args:
        kind: class, an index into `CLASSES`.
        rng: source of everything that is random.
    """
    longest, ratio = rng.integers(80, 201), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    height = int(longest if ratio < 1 else round(longest / ratio))
    width = int(longest if ratio >= 1 else round(longest * ratio))
    short = min(height, width)
    # Pixel centres in units of the short side.
    y, x = (np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)) / np.float32(short)

    shape, texture = CLASSES[kind]
    colours = colour_triple(rng)
    picture = ground(rng, colours[0], x, y)

    radius = rng.uniform(0.32, 0.44)  # of the disc of the same area
    place_x, place_y = (rng.uniform(0.9 * radius, side / short - 0.9 * radius) for side in (width, height))
    u, v = rotated(x - place_x, y - place_y, rng.uniform(0, 2 * np.pi))
    cover = np.clip((1 - gauge(shape, u / radius, v / radius)) * (radius * short) + 0.5, 0, 1)  # [H, W], soft by 1 px

    period = rng.uniform(0.2, 0.3)
    shift_u, shift_v = rng.uniform(-0.5, 0.5, 2) * radius
    s, t = rotated(u + shift_u, v + shift_v, rng.uniform(0, 2 * np.pi))
    field = wave(texture, s / period, t / period)
    # The level that gives the first colour its share of this very object, whatever the texture.
    level = np.quantile(field[cover > 0.5], 1 - rng.uniform(0.35, 0.5))
    first = np.clip((field - level) * (period * short / 4) + 0.5, 0, 1)[..., None]  # [H, W, 1]
    object_ = colours[1] * first + colours[2] * (1 - first)
    picture += cover[..., None] * (object_ - picture)

    slope = rng.uniform(-0.2, 0.2, 2)
    picture *= (1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5))[..., None].astype(np.float32)
    picture += rng.uniform(0.0, 0.03) * rng.standard_normal(picture.shape, dtype=np.float32)
    pixels: NDArray[np.uint8] = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels
