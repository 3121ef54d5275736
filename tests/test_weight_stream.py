"""Weights fetched a block ahead: the same results, the order of events, and what goes wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ideogram4_quant.errors import OpError
from ideogram4_quant.ops import weight_stream
from ideogram4_quant.ops.lanes import HostLane, Inline
from ideogram4_quant.ops.layouts import int8_tensor
from ideogram4_quant.ops.linear import LinearOptions, linear
from ideogram4_quant.ops.weight_stream import WeightStream

HERE = torch.device("cpu")


class Block(nn.Module):
    """A quantized linear and a norm."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, (48, 64), generator=generator).to(torch.int8)
        scale = torch.rand(48, generator=generator) / 100
        weight = int8_tensor(codes, scale, dtype=torch.float32, smooth=None, rotation=16)
        self.w = nn.Module()
        self.w.weight = nn.Parameter(weight, requires_grad=False)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.rand(48, generator=generator), requires_grad=False)

    def forward(self, x):
        return linear(x, self.w.weight, None, LinearOptions()) * self.norm.weight


def read(source, out):
    out.copy_(source.contiguous().view(torch.uint8).view(-1))


@pytest.fixture
def blocks():
    with torch.inference_mode():
        yield [Block(seed) for seed in range(5)]


def stream(blocks, lane=None, budget=0, **more) -> WeightStream:
    more = {"read": read, "executor": Inline(), "away": lambda module, stored: True, **more}
    return WeightStream(blocks, HERE, lane or HostLane(), budget=budget, **more)


def run(blocks, streamed, x, order=None):
    found = []
    for index in order or range(len(blocks)):
        streamed.enter(index)
        try:
            found.append(blocks[index](x))
        finally:
            streamed.leave(index)
    return found


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("budget", [0, 8000, 10**9])
@pytest.mark.parametrize("threads", [False, True])
def test_the_results_are_the_same(blocks, budget, threads):
    wanted = [block(X) for block in blocks]
    stored = [block.w.weight for block in blocks]
    streamed = stream(blocks, budget=budget, executor=None if threads else Inline())
    for _ in range(3):
        assert all(map(torch.equal, run(blocks, streamed, X), wanted))
    assert streamed.kept <= budget
    assert (streamed.kept == streamed.nbytes) == (budget == 10**9)
    streamed.close()
    assert all(block.w.weight is weight for block, weight in zip(blocks, stored, strict=True))


def test_weights_are_those_of_the_slot_while_a_block_runs(blocks):
    streamed = stream(blocks)
    stored = blocks[0].w.weight
    streamed.enter(0)
    lent = blocks[0].w.weight
    assert lent is not stored
    assert type(lent) is type(stored)
    assert torch.equal(lent.dequantize(), stored.dequantize())
    streamed.leave(0)
    assert blocks[0].w.weight is stored


def test_the_next_block_is_fetched_before_this_one_runs(blocks):
    lane = HostLane()
    run(blocks, stream(blocks, lane), X)
    assert lane.events == [
        ("fetch", 0, None),
        ("fetch", 1, None),
        ("run", 0, 0),
        ("fetch", 2, 0),
        ("run", 1, 1),
        ("fetch", 3, 1),
        ("run", 2, 2),
        ("fetch", 4, 2),
        ("run", 3, 3),
        ("run", 4, 4),
    ]


def test_blocks_on_the_device_are_passed_over(blocks):
    """What is fetched ahead is the next block that has to be, however far it is."""
    lane = HostLane()
    away = {id(module) for index in (0, 3, 4) for module in blocks[index].modules()}
    streamed = stream(blocks, lane, away=lambda module, _: id(module) in away)
    assert streamed.indices == (0, 3, 4)
    run(blocks, streamed, X)
    assert [event[:2] for event in lane.events] == [
        ("fetch", 0), ("fetch", 3), ("run", 0), ("fetch", 4), ("run", 3), ("run", 4),
    ]  # fmt: skip


def test_another_order_is_slower_and_right(blocks):
    wanted = [block(X) for block in blocks]
    streamed = stream(blocks)
    order = [0, 3, 1, 4, 2, 2, 0]
    found = run(blocks, streamed, X, order)
    assert all(torch.equal(one, wanted[i]) for one, i in zip(found, order, strict=True))


def test_an_error_in_a_block_leaves_the_stored_weights(blocks):
    stored = [block.w.weight for block in blocks]
    streamed = stream(blocks)
    with pytest.raises(OpError):
        run(blocks, streamed, X[:, :5])
    streamed.close()
    assert all(block.w.weight is weight for block, weight in zip(blocks, stored, strict=True))


@pytest.mark.parametrize("threads", [False, True])
def test_a_read_that_fails_is_raised_where_the_block_would_run(blocks, threads):
    class Gone(Exception):
        pass

    def fail(source, out):
        if source.data_ptr() == blocks[2].w.weight._qdata.data_ptr():
            raise Gone
        read(source, out)

    streamed = stream(blocks, read=fail, executor=None if threads else Inline())
    wanted = [block(X) for block in blocks]
    assert all(map(torch.equal, run(blocks, streamed, X, [0, 1]), wanted))
    with pytest.raises(Gone):
        run(blocks, streamed, X, [2])
    assert torch.equal(run(blocks, streamed, X, [0])[0], wanted[0])  # it goes on
    streamed.close()


def test_reads_that_fail_leave_the_staging_buffers(blocks):
    """Without them weights would go on without pinned memory, more slowly, and nobody told."""
    failing, filled = True, []

    def now_and_then(source, out):
        if failing:
            raise OSError("gone")
        filled.append(out)
        read(source, out)

    streamed = stream(blocks, read=now_and_then)
    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            run(blocks, streamed, X, [4])
    failing = False
    assert torch.equal(run(blocks, streamed, X, [4])[0], blocks[4](X))
    assert filled


def test_without_pinned_memory_it_is_slower_and_said_once(blocks, caplog):
    class Poor(HostLane):
        def pinned(self, nbytes):
            return None

    wanted = [block(X) for block in blocks]
    streamed = stream(blocks, Poor(), budget=10**9)
    for _ in range(2):
        assert all(map(torch.equal, run(blocks, streamed, X), wanted))
    (line,) = caplog.messages
    assert "no pinned memory" in line
    assert "slowly" in line


def test_a_disk_in_every_pass_is_said_once(blocks, caplog, monkeypatch):
    monkeypatch.setattr(weight_stream, "_TELLING", 1)
    monkeypatch.setattr(weight_stream, "_SLOW", 1e15)
    kept = stream(blocks, budget=10**9)
    for _ in range(3):
        run(blocks, kept, X)
    assert not caplog.messages  # read once, the copies stay
    streamed = stream(blocks)
    run(blocks, streamed, X)
    assert not caplog.messages
    for _ in range(3):
        run(blocks, streamed, X)
    (line,) = caplog.messages
    assert "from the disk in every pass" in line
    assert "GB/s" in line


def test_what_is_on_the_device_is_not_fetched(blocks):
    assert WeightStream(blocks, HERE, HostLane(), budget=0, read=read).indices == ()
