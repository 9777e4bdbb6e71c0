"""A head in chunks under FSDP2, in a forward that loops over the blocks, however it is sharded."""

from __future__ import annotations

from laws import run_two_ranks
from test_fsdp import HEAD

SHARDED = (
    HEAD
    + """
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn import functional

    import passes
    from surgery.logits.factored import Factored

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.layers = nn.ModuleList([Block() for _ in range(2)])
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 50, bias=False)

        def forward(self, ids, labels=None):
            h = self.embed(ids)
            for block in self.layers:
                h = block(h)
            z = self.head(self.norm(h))
            if labels is None:
                return z
            return functional.cross_entropy(z.view(-1, 50), labels.view(-1))

    stays = dict(reshard_after_forward=False)
    WAYS = {
        "with the root": lambda m: fully_shard(m),
        "by itself": lambda m: (fully_shard(m.head, **stays), fully_shard(m)),
        "with the norm": lambda m: (fully_shard([m.norm, m.head], **stays), fully_shard(m)),
        "beside embeddings": lambda m: (
            fully_shard(m.embed), fully_shard(m.head, **stays), fully_shard(m)
        ),
    }

    def loss_of(model, ids, outside, sharded):
        if not outside:
            return model(ids, ids)
        z = model(ids)[:, :-1]
        assert isinstance(z, Factored) == sharded
        return -functional.log_softmax(z, -1).gather(-1, ids[:, 1:, None]).mean()

    def started(spec, way):
        torch.manual_seed(0)
        model = Plain().double()
        surgery.apply(model, spec() + ([passes.ChunkedLoss(tokens=5)] if way else []))
        if way:
            for block in model.layers:
                fully_shard(block)
            way(model)
        return model

    def batch(seed, way):
        ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(seed))
        return ids.chunk(2)[rank] if way else ids

    def trained(spec, outside, way=None):
        model = started(spec, way)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            loss_of(model, batch(seed, way), outside, way is not None).backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole_weights(model)

    def misa():
        return [passes.Misa(budget=0.5, period=2)]

    def everything():
        return [passes.Misa(budget=1.0), passes.Recompute()]

    for spec, outside in ((misa, False), (misa, True), (everything, True)):
        expected = trained(spec, outside)
        for name, way in WAYS.items():
            found = trained(spec, outside, way)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=name + key)

    # accelerate shards the root so. The error comes first, and says what to do.
    gone = dict(reshard_after_forward=True)
    for way, part in (
        (lambda m: fully_shard(m, **gone), lambda m: m),
        (lambda m: (fully_shard(m.head, **gone), fully_shard(m)), lambda m: m.head),
    ):
        model = started(misa, way)
        try:
            loss_of(model, batch(0, way), True, True)
            raise AssertionError("the weight was given back")
        except surgery.SurgeryError as error:
            assert "model.set_reshard_after_forward(False, recurse=False)" in str(error), error
        part(model).set_reshard_after_forward(False, recurse=False)
        model.zero_grad()
        loss_of(model, batch(0, way), True, True).backward()
    print("equal")
"""
)


def test_a_head_is_in_chunks_however_it_is_sharded(tmp_path):
    run_two_ranks(SHARDED, tmp_path)
