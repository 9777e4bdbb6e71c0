"""What one process of several holds: predicted, beside the allocator of a real one."""

from __future__ import annotations

import json

import processes
import pytest
import transformers
from torch import distributed

import surgery

CONFIG = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ROWS, LENGTH = 2, 192
ROWS_OF = [  # wrap, passes; none: the plain model
    ("fsdp2", ()),
    ("fsdp2", ("recompute", "chunked_loss")),
    ("fsdp2", ("lisa",)),
    ("fsdp2", ("rso",)),
    ("fsdp2", ("mezo",)),
    ("ddp", ()),
    ("ddp", ("recompute",)),
]

REAL = """
import gc, json, torch, transformers, surgery
from surgery.compat.world import one_of
from surgery.memory import measure
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from test_worlds import CONFIG, LENGTH, ROWS, ROWS_OF

ids = torch.ones(ROWS, LENGTH, dtype=torch.long)

def begun(wrap, spec):
    config = transformers.LlamaConfig(**CONFIG)
    inner = transformers.LlamaForCausalLM(config).train()
    if wrap == "fsdp2":
        for block in inner.model.layers:
            fully_shard(block)
        fully_shard(inner)
    if spec:
        surgery.apply(inner, [*spec])
    model = inner
    if wrap == "ddp":
        model = DistributedDataParallel(inner, find_unused_parameters="lisa" in spec)
    optimizer = torch.optim.AdamW([p for p in inner.parameters() if p.requires_grad])

    def step():
        ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()  # DDP lays out its buckets anew once it knows in which order gradients come
    gc.collect()
    return step

def measured(wrap):
    for own, spec in ROWS_OF:
        if own == wrap:
            first = measure(lambda: begun(wrap, spec), cpu)  # what stays, whoever holds it
            found.append(first.live + measure(first.result, cpu).peak)
            del first
            gc.collect()

torch.set_num_threads(1)
cpu, found = torch.device("cpu"), []
# Real memory, and collectives that send nothing: threads of gloo hold what they send for a moment.
with one_of(2):
    begun("fsdp2", ("mezo",))  # fills the library's own caches
    measured("fsdp2")
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
measured("ddp")
torch.distributed.destroy_process_group()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    (printed,) = processes.run(REAL, tmp_path_factory.mktemp("world"), [])
    peaks = json.loads(printed.splitlines()[-1])
    return dict(zip(ROWS_OF, peaks, strict=True))


@pytest.mark.parametrize("row", ROWS_OF, ids=lambda row: " ".join([row[0], *row[1]]))
@pytest.mark.filterwarnings("ignore:.*scalars that")
def test_the_peak_of_a_process_of_two(row, measured):
    wrap, spec = row
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).train()
    found = surgery.plan(model, (ROWS, LENGTH), [*spec] or "lisa", world=2, wrap=wrap)
    peak = found.after.peak if spec else found.before.peak
    assert peak == pytest.approx(measured[row], rel=0.01)
    if not spec:  # shards of 128 and 512 rows: no rank has more than half
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        share = whole / (2 if wrap == "fsdp2" else 1)
        assert found.before.parameters == pytest.approx(share, rel=1e-3)
        assert found.before.optimizer == pytest.approx(2 * share, rel=1e-3)
    assert not distributed.is_initialized()
