"""Decoders and the conversion agree on which damaged images are good, and on their pixels, also without a C compiler.

`MVSSL_MUTATIONS=1000 pytest tests/pipelines/decode/test_agreement.py` tries a thousand mutations of each image.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pipelines.conversion.image_check import WarningLog, check_image
from pipelines.decode import damage, make_decoder
from pipelines.decode.pillow import decode_one
from pipelines.loading.fetch import Fetcher
from tests.samples.decode_samples import MemorySource, needs_dali, needs_ffcv_library, only_dalis_jpeg
from tests.samples.mutations import mutated, opened_by_pillow, originals

COUNT = int(os.environ.get("MVSSL_MUTATIONS", "20"))
ORIGINALS = originals()
JPEGS = [name for name in ORIGINALS if "JPEG" in name or name == "MPO"]
DECODERS = [pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"]
BATCH = 16


@pytest.fixture(params=["C compiler", "no C compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "no C compiler":
        monkeypatch.setattr(damage, "load_library", lambda _: "none was found")
    damage._library.cache_clear()
    yield
    damage._library.cache_clear()


def mutations(name: str) -> list[np.ndarray]:
    """The image itself, and mutations of it; seeds differ from image to image."""
    first = list(ORIGINALS).index(name) * 100_000
    changed = [mutated(ORIGINALS[name], first + n) for n in range(COUNT)]
    return [np.frombuffer(data, np.uint8) for data in (ORIGINALS[name], *changed)]


def judged(files: list[np.ndarray]) -> list[np.ndarray | str]:
    """Pixels by Pillow, or why there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [decode_one(data) for data in files]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", JPEGS)
def test_decoders_agree(name: str, decoder: str) -> None:
    """In the first epoch and in later ones."""
    files = [*mutations(name), only_dalis_jpeg()]
    expected = judged(files)
    made = make_decoder(decoder, device="cpu", batch_size=BATCH, threads=1)
    fetcher = Fetcher(MemorySource(files), made)
    for _ in range(2):
        for start in range(0, len(files), BATCH):
            fetched = fetcher(range(start, min(start + BATCH, len(files))))
            want = expected[start : start + BATCH]
            assert fetched.failures == {n: reason for n, reason in enumerate(want) if isinstance(reason, str)}
            good = [torch.from_numpy(np.array(pixels)) for pixels in want if not isinstance(pixels, str)]
            assert [tuple(size) for size in fetched.batch.sizes.tolist()] == [pixels.shape[:2] for pixels in good]
            assert all(torch.equal(fetched.batch.image(n), pixels) for n, pixels in enumerate(good))
    fetcher.close()


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_conversion_agrees(name: str) -> None:
    files, log = mutations(name), WarningLog()
    with log.collecting():
        converted = [check_image(data, max_size=None, log=log).bad for data in files]
    assert converted == [pixels if isinstance(pixels, str) else "" for pixels in judged(files)]


@pytest.mark.parametrize("name", [name for name in ORIGINALS if "16 bit" not in name and "rotated" not in name])
def test_good_images_have_the_pixels_of_pillow(name: str) -> None:
    """Damaged ones too. Pillow alone takes some JPEGs that lack their end marker."""
    for data, pixels in zip(mutations(name), judged(mutations(name)), strict=True):
        if not isinstance(pixels, str):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    alone = opened_by_pillow(data.tobytes())
            except Exception as error:
                raise AssertionError(name) from error
            assert pixels.shape == alone.shape or pixels.shape[:2] == alone.shape[1::-1]  # turned by damage to its EXIF
            if pixels.shape == alone.shape:
                assert np.array_equal(pixels, alone)


def test_the_corpus_has_good_and_bad_images() -> None:
    """Else the tests above would prove nothing."""
    verdicts = [isinstance(pixels, str) for name in JPEGS for pixels in judged(mutations(name)[1:])]
    assert 0.2 < np.mean(verdicts) < 0.8
    intact = {name: judged(mutations(name)[:1])[0] for name in ORIGINALS if "said to" not in name}
    assert not [name for name, pixels in intact.items() if isinstance(pixels, str)]
