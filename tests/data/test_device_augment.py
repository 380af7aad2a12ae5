"""Knows: augmentation of batches against that of utterances (lhotse's, ours). Must not know: models."""
from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lhotse.dataset import SpecAugment

from icefall_fusion.data.device_augment import DeviceAugment, time_warp
from icefall_fusion.data.frequency_warp import warp_frequencies
from icefall_fusion.data.noise_mix import mix
from icefall_fusion.data.options import DataOptions

PLAIN = DataOptions(spec_augment=False, noise_lowest=-5.0, noise_highest=15.0, noise_share=1.0)
MASKS = DataOptions(time_warp=0, feature_masks=2, feature_mask_size=20, frame_masks=4, frame_mask_size=30,
                    frame_mask_fraction=0.2, spec_augment_share=0.8)


def speech(lens: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [B,T,80], with numbers behind the ends that nothing may use, and lens [B]."""
    chance = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lens), max(lens), 80, generator=chance) * 3 - 5
    for row, length in zip(features, lens):
        row[length:] = float("nan")
    return features, torch.tensor(lens)


def augmented(options: DataOptions, features: torch.Tensor, lens: torch.Tensor, seed: int = 1, noise=None):
    augment = DeviceAugment(options, "cpu", noise)
    masks = torch.from_numpy(np.stack(augment.frame_masks(lens.numpy())))
    return augment(features, lens, masks, seed)


def uniform(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the numbers that a batch of this seed draws."""
    chance = torch.Generator().manual_seed(seed)
    return [torch.rand(*shape, generator=chance) for shape in shapes]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_time_warp_is_that_of_single_utterances(lens: list[int], factor: int, seed: int) -> None:
    features, sizes = speech(lens)
    first, second = uniform(seed, (2, len(lens)))[0]
    made = time_warp(features, sizes, factor, first, second)
    for row, one, length, u, v in zip(features, made, lens, first, second):
        row, room = row[:length], length - 2 * factor - 1
        if room > 0:
            center = factor + 1 + int(u * room)
            moved = center - factor + int(v * (2 * factor + 1))
            parts = ((row[:center], moved), (row[center:], length - moved))
            stretched = [
                torch.nn.functional.interpolate(part[None, None], (size, 80), mode="bicubic")[0, 0]
                for part, size in parts
            ]
            row = row if moved == center else torch.cat(stretched)
        torch.testing.assert_close(one[:length], row, atol=2e-4, rtol=0)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_frequency_warp_is_that_of_single_utterances(lens: list[int], seed: int) -> None:
    options = dataclasses.replace(PLAIN, frequency_warp=0.2)
    features, sizes = speech(lens)
    made = augmented(options, features, sizes, seed)
    factors = 0.8 + 0.4 * uniform(seed, (1, len(lens)))[0][0].double()
    for row, one, length, factor in zip(features, made, lens, factors):
        expected = warp_frequencies(row[:length], float(factor))
        torch.testing.assert_close(one[:length], expected, atol=1e-4, rtol=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_noise_is_mixed_as_into_single_utterances(lens: list[int], seed: int) -> None:
    features, sizes = speech(lens)
    chance = torch.Generator().manual_seed(7)
    recordings = [torch.randn(count, 80, generator=chance) for count in (7, 40, 3)]
    noise = torch.cat(recordings).half(), torch.tensor([0, 7, 47]), torch.tensor([7, 40, 3])
    made = augmented(PLAIN, features, sizes, seed, noise)
    _, which, begin, level = uniform(seed, (4, len(lens)))[0].tolist()
    for at, (row, one, length) in enumerate(zip(features, made, lens)):
        heard = recordings[int(which[at] * 3)].half().float()
        # the product of lengths and shares is rounded: a begin that lies on a frame may be the one before
        near = [mix(row[:length], heard, begin[at] + more, -5 + 20 * level[at]) for more in (-1e-6, 0, 1e-6)]
        assert min(float((one[:length] - other).abs().max()) for other in near) < 1e-3
    quiet = augmented(dataclasses.replace(PLAIN, noise_share=0.0), features, sizes, seed, noise)
    assert torch.equal(quiet.nan_to_num(), features.nan_to_num())


def test_noise_has_the_shares_and_ratios_that_were_asked_for() -> None:
    options = dataclasses.replace(PLAIN, noise_share=0.4)
    features, lens = speech([60] * 2000)
    noise = torch.randn(500, 80).half(), torch.tensor([0]), torch.tensor([500])
    made = augmented(options, features, lens, noise=noise)
    energy = lambda one: one.double().exp().sum((1, 2))  # noqa: E731
    added = energy(made) / energy(features) - 1
    heard = added > 1e-6
    assert abs(float(heard.double().mean()) - 0.4) < 0.05
    ratios = -10 * torch.log10(added[heard])
    assert -5.1 < ratios.min() < -4.5 and 14.5 < ratios.max() < 15.1
    assert abs(float(ratios.mean()) - 5.0) < 4 * 20 / math.sqrt(12 * len(ratios))


@pytest.mark.parametrize("length", [40, 130, 700])
def test_masks_are_distributed_as_those_of_lhotse(length: int) -> None:
    features, lens = speech([length] * 1500)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    theirs = SpecAugment(0, 2, 20, 4, 30, 0.2, 0.8)(features)
    ours = augmented(MASKS, features, lens)
    counts = []
    for made in (theirs, ours):
        hidden = made != features
        bins, frames = hidden.all(1).sum(1).double(), hidden.all(2).sum(1).double()  # of each utterance
        edges = hidden.all(1).double().mean(0), hidden.all(2).double().mean(0)  # of each filter, frame
        counts.append((bins, frames, *edges, hidden.any((1, 2)).double()))
        values = made[hidden.any((1, 2))][0]
        value = values[hidden[hidden.any((1, 2))][0]]
        assert float(value.max() - value.min()) == 0.0
    for one, two in zip(counts[0], counts[1]):
        error = math.sqrt((float(one.var()) + float(two.var())) / len(one)) + 1e-3
        assert abs(float(one.mean() - two.mean())) < 4 * error
        assert abs(float(one.std() - two.std())) < 0.15 * float(one.std()) + 0.02
    whole = [torch.cat((bins, frames)).max() for bins, frames, *_ in counts]
    assert abs(float(whole[0] - whole[1])) <= 0.25 * float(whole[0])


@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(0, 2**31 - 1))
def test_masks_lie_in_the_utterance_and_hold_its_mean(lens: list[int], seed: int) -> None:
    features, sizes = speech([*lens, 1])  # of one frame too
    options = dataclasses.replace(MASKS, spec_augment_share=1.0)
    made = augmented(options, features, sizes, seed)
    assert torch.equal(made.nan_to_num(), augmented(options, features, sizes, seed).nan_to_num())
    for row, one, length in zip(features, made, lens):
        row, one = row[:length], one[:length]
        hidden = one != row
        assert bool(torch.isfinite(one).all())
        if hidden.any():
            torch.testing.assert_close(one[hidden], row.mean().expand(int(hidden.sum())), atol=1e-4, rtol=0)
        assert int(hidden.all(0).sum()) < 40 or length < 2
        assert int(hidden.all(1).sum()) <= 0.2 * length
