"""FFCV decoder: damaged JPEGs go to Pillow, threads, missing installations, and the loader with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.decode import Decoder, ffcv, make_decoder
from pipelines.runtime import InputError
from tests.samples.decode_samples import encode, jpegs, needs_ffcv_library, picture, with_orientation
from tests.samples.loader_samples import loader_of, source_with
from tests.samples.other_threads import RELEASED, turns_of_another_thread


def both(threads: int = 2) -> tuple[ffcv.FfcvDecoder, Decoder]:
    decoder = make_decoder("ffcv", device="cpu", batch_size=64, threads=threads)
    assert isinstance(decoder, ffcv.FfcvDecoder)
    return decoder, make_decoder("pillow", device="cpu", batch_size=64, threads=threads)


@needs_ffcv_library
def test_damaged_jpegs_give_the_results_of_pillow_in_any_batch() -> None:
    decoder, pillow = both()
    generator = np.random.default_rng(0)
    files = jpegs(40)
    for n in range(0, 40, 2):
        damaged = files[n].copy()
        at = int(generator.integers(len(damaged) // 2, len(damaged) - 10))
        damaged[at : at + 4] = generator.integers(0, 256, 4)
        files[n] = damaged
    ours, theirs = decoder(files), pillow(files)
    assert ours.failures == theirs.failures
    assert torch.equal(ours.sizes, theirs.sizes)
    assert torch.equal(ours.pixels, theirs.pixels)
    for n in range(40):
        alone = decoder([files[n]])
        assert bool(alone.failures) == (n in ours.failures)
    decoder.close()


@needs_ffcv_library
def test_an_orientation_after_much_other_metadata_is_applied() -> None:
    decoder, pillow = both()
    data = encode(picture(40, 50), icc_profile=b"x" * 150_000).tobytes()
    turned = with_orientation(encode(picture(8, 8)), 6, "MM").tobytes()
    start = turned.index(b"\xff\xe1")
    segment = turned[start : start + 2 + int.from_bytes(turned[start + 2 : start + 4], "big")]
    frame = data.index(b"\xff\xdb")  # the tables behind the profile
    file = np.frombuffer(data[:frame] + segment + data[frame:], np.uint8)
    ours, theirs = decoder([file]), pillow([file])
    assert theirs.sizes.tolist() == [[50, 40]]
    assert torch.equal(ours.sizes, theirs.sizes)
    assert torch.equal(ours.pixels, theirs.pixels)
    decoder.close()


@needs_ffcv_library
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_and_images(threads: int) -> None:
    decoder, pillow = both(threads)
    for count in (1, 2, 7, 40):
        ours, theirs = decoder(jpegs(count)), pillow(jpegs(count))
        assert torch.equal(ours.pixels, theirs.pixels)
    decoder.close()
    decoder.close()


@needs_ffcv_library
def test_decoding_releases_the_gil() -> None:
    decoder, _ = both(threads=1)
    large = [encode(picture(1500, 2000)) for _ in range(2)]
    assert turns_of_another_thread(lambda: decoder(large)) > RELEASED
    decoder.close()


@needs_ffcv_library
def test_the_loader_gives_the_views_of_the_other_decoders() -> None:
    source = source_with()
    with_ffcv, with_pillow = loader_of(source, decoder="ffcv"), loader_of(source, decoder="pillow")
    assert with_ffcv.decoder_name == "ffcv"
    for ours, theirs in zip(with_ffcv.epoch(0), with_pillow.epoch(0), strict=True):
        assert torch.equal(ours.index, theirs.index)
        for mine, expected in zip(ours.views, theirs.views, strict=True):
            assert torch.equal(mine, expected)
    with_ffcv.close()
    with_pillow.close()


def test_a_missing_library_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ffcv.load_ffcv.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = r"decoder is 'ffcv' but FFCV's library cannot be used \(the package ffcv is not installed\): run tools/"
    with pytest.raises(InputError, match=sentence):
        make_decoder("ffcv", device="cpu", batch_size=4, threads=1)

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / "_libffcv.so").write_bytes(b"no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(InputError, match=r"decoder is 'ffcv' but .*_libffcv\.so"):
        make_decoder("ffcv", device="cpu", batch_size=4, threads=1)
    ffcv.load_ffcv.cache_clear()
