"""The predictor bank against separate MLPs built from torch's own layers and called view by view."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mvssl.heads import MLP, PredictorBank
from mvssl.recipe import Head
from pipelines.errors import InputError

TASKS = ("global", "local", "cutout")
SLOTS = (0, 0, 1, 1, 2)


def torch_mlp(width: int, head: Head) -> nn.Sequential:
    layers: list[nn.Module] = []
    for hidden in head.hidden:
        layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        width = hidden
    layers.append(nn.Linear(width, head.out))
    if head.output_norm:
        layers.append(nn.BatchNorm1d(head.out, affine=False))
    return nn.Sequential(*layers)


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)


@pytest.fixture(params=[Head(hidden=(7,), out=4), Head(hidden=(7, 6), out=4, output_norm=True), Head(hidden=(), out=4)])
def pair(request: pytest.FixtureRequest) -> tuple[PredictorBank, list[nn.Sequential]]:
    """A bank and T torch MLPs with its weights, copied tensor by tensor."""
    bank = PredictorBank(TASKS, 5, request.param).double()
    randomise(bank, 1)
    singles = [torch_mlp(5, request.param).double() for _ in TASKS]
    for slot, single in enumerate(singles):
        own = single.state_dict()
        for name, tensor in bank.state_dict().items():
            value = tensor[slot]
            own[name.removeprefix("layers.")].copy_(value.T if value.dim() == 2 else value)
    return bank, singles


@pytest.mark.parametrize("slots", [SLOTS, (2, 0, 1), (0, 1, 2), (1,)])
def test_bank_equals_separate_mlps(pair: tuple[PredictorBank, list[nn.Sequential]], slots: tuple[int, ...]) -> None:
    bank, singles = pair
    z = torch.randn(len(slots), 6, 5, dtype=torch.float64, requires_grad=True)
    apart = z.detach().clone().requires_grad_()
    weight = torch.randn(len(slots), 6, 4, dtype=torch.float64)
    ours = bank(z, slots)
    expected = torch.stack([singles[slot](apart[view]) for view, slot in enumerate(slots)])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(z.grad, apart.grad, rtol=1e-11, atol=1e-11)
    for name, p in bank.named_parameters():
        for slot, single in enumerate(singles):
            theirs = dict(single.named_parameters())[name.removeprefix("layers.")].grad
            mine = p.grad[slot]
            if theirs is None:  # no view went through this slot
                assert not mine.any()
            else:
                torch.testing.assert_close(mine.T if mine.dim() == 2 else mine, theirs, rtol=1e-11, atol=1e-11)
    for name, buffer in bank.named_buffers():
        for slot, single in enumerate(singles):
            theirs = dict(single.named_buffers())[name.removeprefix("layers.")]
            torch.testing.assert_close(buffer[slot], theirs, rtol=1e-13, atol=1e-13)

    bank.eval()
    expected = torch.stack([singles[slot].eval()(apart[view]) for view, slot in enumerate(slots)])
    torch.testing.assert_close(bank(z, slots), expected, rtol=1e-12, atol=1e-12)


def test_conversions_keep_everything(pair: tuple[PredictorBank, list[nn.Sequential]]) -> None:
    bank, singles = pair
    mlps = bank.to_mlps()
    assert tuple(mlps) == TASKS
    for mlp, single in zip(mlps.values(), singles, strict=True):
        for name, value in single.state_dict().items():
            assert torch.equal(mlp.state_dict()[name], value)
    back = PredictorBank.from_mlps(mlps)
    assert back.tasks == TASKS
    for name, value in bank.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)
        assert back.state_dict()[name].data_ptr() != value.data_ptr()


def test_mlps_of_other_shapes_make_no_bank() -> None:
    with pytest.raises(InputError, match="one or more of one shape"):
        PredictorBank.from_mlps({"a": MLP(5, Head(hidden=(7,), out=4)), "b": MLP(6, Head(hidden=(7,), out=4))})
    with pytest.raises(InputError, match="got 0 predictors"):
        PredictorBank.from_mlps({})


def ks_distance(sample: Tensor, bound: float) -> float:
    """Largest distance between a sample's distribution function and that of the uniform one in [-bound, bound]."""
    ordered = sample.flatten().sort().values.double()
    uniform = (ordered + bound) / (2 * bound)
    return (torch.arange(1, len(ordered) + 1) / len(ordered) - uniform).abs().max().item()


def test_initialisation_is_that_of_linear_layers() -> None:
    torch.manual_seed(0)
    head = Head(hidden=(400,), out=300)
    bank, single = PredictorBank(TASKS, 100, head), torch_mlp(100, head)
    for index, fan_in in ((0, 100), (3, 400)):
        bound = 1 / math.sqrt(fan_in)
        for slot in range(len(TASKS)):
            weight = bank.layers[index].weight[slot].detach()
            # 1.95 / sqrt(n) is passed by a true sample with probability 0.999.
            assert ks_distance(weight, bound) < 1.95 / math.sqrt(weight.numel())
        assert ks_distance(single[index].weight.detach(), bound) < 1.95 / math.sqrt(single[index].weight.numel())
        assert not torch.equal(bank.layers[index].weight[0], bank.layers[index].weight[1])
    bias = bank.layers[3].bias.detach()
    assert ks_distance(bias, 1 / 20) < 1.95 / math.sqrt(bias.numel())
    assert (bank.layers[1].weight == 1).all()
    assert (bank.layers[1].bias == 0).all()
