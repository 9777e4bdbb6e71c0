"""A canary for each private or version-bound name that `surgery/compat` stands on.

Each runs the thing itself, small, and fails with a sentence that says what to look at.
"""

from __future__ import annotations

import ast
import copy
import gc
import importlib
import inspect
import logging
import pickle
import pkgutil
import shutil
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from laws import run_two_ranks
from models import TAKES_ADAPTERS, make
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import surgery
from surgery import compat
from surgery.compat import (
    autograd,
    caches,
    dynamo,
    failures,
    fsdp,
    hf,
    inductor,
    known,
    modules,
    optimizers,
    stage,
    tensors,
    uncompiled,
    world,
)
from surgery.engine import callers, exhausted


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(s, x: torch.Tensor, flag: str = "") -> torch.Tensor:
        for layer in s.layers:
            x = layer(x)
        return x * (1 + len(flag))


def captured(model: nn.Module, *args, most: int = 8):
    graphs = []

    def backend(graph, inputs):
        graphs.append((graph, inputs))
        assert dynamo.fake_mode_of(inputs) is not None, "torch._guards.detect_fake_mode finds none"
        return graph.forward

    run = dynamo.capture(model.forward, backend, most)
    with dynamo.capturing(most):
        run(*args)
    return run, graphs


# -- dynamo ----------------------------------------------------------------------------------------


def test_a_capture_gives_graphs_whose_inputs_are_the_parameters():
    model = Two()
    _, ((_, inputs),) = captured(model, torch.randn(2, 4))
    known = {id(parameter) for parameter in model.parameters()}
    assert known <= {id(value) for value in inputs}, (
        "parameters are no inputs of a captured graph any more: sites cannot be found by identity. "
        "Look at torch._dynamo.config.inline_inbuilt_nn_modules."
    )


def test_captures_of_one_class_do_not_share_a_cache():
    x = torch.randn(2, 4)
    counts = [len(captured(Two(), x)[1]) for _ in range(3)]
    assert counts == [1, 1, 1], (
        "isolate_recompiles=, or the code object of its own, does not isolate"
    )


def test_the_limit_of_a_capture_raises():
    run, graphs = captured(Two(), torch.randn(2, 4), most=3)
    with pytest.raises(dynamo.LimitHit):  # else Dynamo runs the model without the rewrite, silently
        for flag in ("a", "bb", "ccc", "dddd"):
            with dynamo.capturing(3):
                run(torch.randn(2, 4), flag)
    assert len(graphs) == 3, "recompile_limit is counted otherwise"


def test_other_shapes_are_no_other_capture():
    run, graphs = captured(Two(), torch.randn(2, 4))
    with dynamo.capturing(8):
        run(torch.randn(3, 4))
        run(torch.randn(7, 4))
    assert len(graphs) == 1, "dynamic=True specialises shapes now"


def test_a_captures_caches_go_with_it():
    """caches.forget: Dynamo keeps a code by what it made of it, in the code's own cache."""
    made, symbols, modes = [], [], []

    def backend(graph, inputs):
        made.append(weakref.ref(graph))
        mode = dynamo.fake_mode_of(inputs)
        symbols.append(mode.shape_env)
        modes.append(weakref.ref(mode))
        return graph.forward

    run = dynamo.capture(Two.forward, backend, 8)
    with dynamo.capturing(8):
        run(Two(), torch.randn(2, 4))
    assert made[0]() is not None and symbols[0].fake_tensor_cache
    (entry,) = caches._debug_get_cache_entry_list(run._torchdynamo_orig_callable.__code__)
    guards = entry.guard_manager
    assert vars(guards)["root"] is not None, "look at torch._dynamo.guards.GuardManagerWrapper"
    del run, entry
    gc.collect()
    assert not {name for name, value in vars(guards).items() if value is not None}
    assert modes[0]() is None, "look at ShapeEnv: tracked_fakes, caches of its functions"
    assert made[0]() is None, "look at torch._C._dynamo.eval_frame.reset_code"
    assert not symbols[0].fake_tensor_cache, "look at ShapeEnv.fake_tensor_cache"


def test_an_error_of_ours_in_a_backend_comes_out_as_itself():
    from surgery.errors import CaptureError

    def backend(graph, inputs):
        raise CaptureError("as it is")

    run = dynamo.capture(Two().forward, backend, 8)
    with pytest.raises(CaptureError, match=r"^as it is$"), dynamo.capturing(8):
        run(torch.randn(2, 4))


def test_advice_that_is_logged_once_neither_breaks_the_graph_nor_logs_a_traceback(capfd):
    logger = logging.getLogger("transformers.canary")

    class Advises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            logger.warning_once("advice")  # a method that transformers adds
            return self.layer(x)

    _, graphs = captured(Advises(), torch.randn(2, 4))
    assert len(graphs) == 1, "look at torch._dynamo.config.ignore_logging_functions"
    assert "Traceback" not in capfd.readouterr().err, "dynamo.capturing: the set cannot be sorted"


class Asks:
    """In the place of a forward, as ours is."""

    def __init__(self, forward) -> None:
        self.forward, self.found = forward, []

    def __call__(self, *args):
        self.found.append(dynamo.outer_backend())
        return self.forward(*args)


def test_the_backend_of_an_outer_compile_is_found():
    model = Two()
    model.__dict__["forward"] = asks = Asks(model.forward)

    def mine(graph, inputs):
        return graph.forward

    model(torch.ones(1, 4))
    torch.compile(model, backend=mine)(torch.ones(1, 4))
    assert asks.found[0] is None and dynamo.name_of_backend(asks.found[1]) == "mine", (
        "dynamo.outer_backend: look at get_eval_frame_callback and _torchdynamo_orig_backend"
    )
    assert dynamo.name_of_backend("inductor") == "inductor"


def test_a_model_with_torch_compile_around_it_is_known():
    assert dynamo.is_around(torch.compile(Two())) and not dynamo.is_around(Two()), (
        "dynamo.is_around: torch.compile(model) returns no torch._dynamo.OptimizedModule"
    )


def test_backends_are_known_by_name():
    assert "inductor" in dynamo.backends() and "aot_eager" in dynamo.backends(hidden=True)
    assert callable(dynamo.backend_named("eager")), "torch._dynamo.backends.registry has moved"


def test_a_checkpoint_is_the_operator_that_we_replace():
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    policy = lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default])  # noqa: E731

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = checkpoint(self.layer, x, use_reentrant=False)
            return checkpoint(self.layer, x, use_reentrant=False, context_fn=policy)

    _, ((graph, _),) = captured(Checkpointed(), torch.randn(2, 4, requires_grad=True))
    nodes = graph.graph.find_nodes(op="call_function", target=dynamo.CHECKPOINT)
    assert len(nodes) == 2, (
        "torch._higher_order_ops.wrap.tag_activation_checkpoint is not it any more"
    )
    policies = [dynamo.policy_of(graph.get_submodule(str(n.args[0].target))) for n in nodes]
    assert policies == [None, policy], "the context_fn of a captured checkpoint stands elsewhere"


def test_nodes_tell_the_module_that_they_come_from():
    model = Two()
    _, ((graph, _),) = captured(model, torch.randn(2, 4))
    stacks = [dynamo.stack_of(node) for node in graph.graph.nodes]
    places = {stack[-1] for stack in stacks if stack}
    expected = {(id(layer), f"layers.{i}") for i, layer in enumerate(model.layers)}
    assert expected <= places, f"nn_module_stack has another form: {places}"


def test_copies_of_a_graph_keep_the_sources_of_their_inputs():
    from surgery.graph.lowering import duplicate

    _, ((graph, _),) = captured(Two(), torch.randn(2, 4))
    for node, copied in zip(graph.graph.nodes, duplicate(graph).graph.nodes, strict=True):
        if node.op == "placeholder":
            assert copied._dynamo_source is node._dynamo_source


def test_dynamo_does_not_look_into_what_it_is_kept_from():
    seen = []

    def call(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    torch.compile(lambda x: dynamo.past(call)(x) * 2, backend="eager")(torch.ones(2))
    assert seen == [False]


@pytest.mark.parametrize("first", ["distinct", "one tensor twice"])
def test_a_call_that_is_given_less_and_one_tensor_twice_is_captured(first):
    """Dynamo's words for a recapture read arguments of earlier calls that are not there now."""
    model = surgery.apply(make("llama"), "recompute")
    ids = torch.randint(0, 96, (2, 12))
    labels = ids.clone() if first == "distinct" else ids
    model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(24)).loss.backward()
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, make("llama")(input_ids=ids, labels=ids).loss)
    model(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids)).loss.backward()


def test_canary_known_and_uncompiled():
    """known.Known has the data of what comes of numbers; uncompiled.uncompiled runs as written."""
    whole, fake = torch.tensor([1, 2]), torch.empty(2, dtype=torch.long, device="meta")
    data = known.Known()
    data.note(fake, whole)
    found = data.result(torch.ops.aten.add.Tensor, (fake, fake), {})
    assert torch.equal(found, torch.tensor([2, 4])), "Look at func._schema and at torch.Tag"
    fake.add_(1)
    assert data.result(torch.ops.aten.add.Tensor, (fake, fake), {}) is None, "_version is gone"
    calls = []
    compile = torch.compile
    with uncompiled.uncompiled():
        torch.compile(lambda: calls.append(torch.compiler.is_compiling()))()
    assert calls == [False] and torch.compile is compile, "look at torch.compiler.set_stance"


def test_symbolic_conditions():
    assert dynamo.surely(True) and not dynamo.surely(False)


# -- modules, autograd, tensors --------------------------------------------------------------------


def test_what_a_module_holds():
    model = Two()
    assert modules.held(model.layers[0], "weight") is model.layers[0].weight
    assert modules.held(model.layers[0], "other") is None
    model.add_module("extra", nn.Identity())
    assert isinstance(modules.child(model, "extra"), nn.Identity)
    modules.take_child(model, "extra")
    modules.take_child(model, "extra")
    assert modules.child(model, "extra") is None and not hasattr(model, "extra")
    names, keys = [name for name, _ in model.named_children()], list(model.state_dict())
    with modules.without_children(model, {names[0]}):
        left = [name for name, _ in model.named_children()]
        assert left == names[1:], "nn.Module lists children from elsewhere than _modules"
        assert not any(key.startswith(f"{names[0]}.") for key in model.state_dict())
    assert [name for name, _ in model.named_children()] == names
    assert list(model.state_dict()) == keys
    plain = model(torch.ones(1, 4))
    handle = model.register_forward_hook(lambda module, args, out: out + 1)
    ((key, hook),) = modules.forward_hooks(model)
    modules.take_hook(model, key)
    assert torch.equal(model(torch.ones(1, 4)), plain), "a hook that is taken off is still called"
    modules.put_hook(model, key, hook)
    assert torch.equal(model(torch.ones(1, 4)), plain + 1)
    handle.remove()
    assert not list(modules.forward_hooks(model))


def test_a_graph_module_keeps_what_it_is_told_to_when_it_is_copied():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    graph.mine = "kept"
    assert not hasattr(copy.deepcopy(graph), "mine")
    modules.keep(graph, "mine", graph.mine)
    assert copy.deepcopy(graph).mine == "kept", "_USER_PRESERVED_ATTRIBUTES_KEY has another meaning"
    modules.drop(graph, "mine")
    assert not hasattr(copy.deepcopy(graph), "mine") and not graph.meta


def test_checkpoints_neither_see_nor_miss_an_unsaved_module():
    model = Two()
    keys = list(model.state_dict())
    table = modules.Unsaved()
    table.register_parameter("hidden", nn.Parameter(torch.ones(2)))
    model.table = table
    assert list(model.state_dict()) == keys and "table.hidden" in dict(model.named_parameters())
    model.load_state_dict(model.state_dict(), strict=True)


def test_parameters_under_names_with_dots():
    owner = modules.Unsaved()
    type(owner).__getattr__, kept = modules.look_up, nn.Module.__getattr__
    try:
        first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))
        modules.hold(owner, "layers.0.weight", first)
        modules.hold(owner, "layers.0.bias", second)
        assert [name for name, _ in owner.named_parameters()] == [
            "layers.0.weight",
            "layers.0.bias",
        ]
        model = nn.Module()
        model.table = owner
        assert model.get_parameter("table.layers.0.weight") is first
        assert isinstance(owner.layers, modules.Path) and getattr(owner.layers, "0").bias is second
        with pytest.raises(AttributeError, match="no attribute 'layer'"):
            owner.__getattr__("layer")
        with modules.without(model, {id(first)}):
            assert [name for name, _ in model.named_parameters()] == ["table.layers.0.bias"]
        assert next(iter(owner.parameters())) is first
        seen = []
        owner.change = lambda fn, each: seen.append(fn(torch.ones(1)).dtype)
        model.double()
        assert seen == [torch.float64] and first.dtype == torch.float32, "look at nn.Module._apply"
        copied = modules.deepcopied(owner, {})
        assert type(copied) is type(owner) and copied.layers.__getattr__("0").weight is not first
    finally:
        type(owner).__getattr__ = kept


def test_callbacks_at_the_end_of_backward_run_behind_what_was_queued():
    said = []
    leaf = torch.ones(3, requires_grad=True)

    def hook(grad):
        autograd.after_backward(lambda: autograd.after_backward(lambda: said.append("ours")))
        autograd.after_backward(lambda: said.append("theirs"))

    leaf.register_hook(hook)
    leaf.sum().backward()
    assert said == ["theirs", "ours"], "look at Variable._execution_engine.queue_callback"


def test_a_backward_knows_that_it_is_to_be_differentiated():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            autograd.first_order_only("canary")
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Once.apply(x).sum(), x)
    with pytest.raises(surgery.SurgeryError, match=r"canary: .*second time"):
        torch.autograd.grad(Once.apply(x).sum(), x, create_graph=True)


def test_hooks_of_tensors_are_found():
    weight = nn.Parameter(torch.ones(2))
    assert not autograd.hooks_of(weight) and not autograd.later_hooks_of(weight)
    double, later = (lambda grad: 2 * grad), (lambda _: None)
    handles = [weight.register_hook(double), weight.register_post_accumulate_grad_hook(later)]
    assert autograd.hooks_of(weight) == [double], "look at Tensor._backward_hooks"
    assert len(autograd.later_hooks_of(weight)) == 1, "look at _post_accumulate_grad_hooks"
    for handle in handles:
        handle.remove()
    assert not autograd.hooks_of(weight) and not autograd.later_hooks_of(weight)


def test_versions_and_norms():
    t = torch.zeros(3)
    before = autograd.version(t)
    t.add_(1)
    assert autograd.version(t) > before, "changes in place do not raise a version any more"
    found = autograd.norms([torch.ones(4), torch.ones(9, dtype=torch.bfloat16)], torch.float32)
    assert [float(norm) for norm in found] == [2.0, 3.0] and found[1].dtype == torch.float32


def test_storages_and_fakes():
    x = torch.zeros(4)
    assert tensors.storage_of(x) == tensors.storage_of(x[1:]) != tensors.storage_of(x.clone())
    with tensors.fakes():
        fake = torch.zeros(4)
        assert tensors.storage_of(fake) == tensors.storage_of(fake.view(2, 2))
    assert tensors.is_fake(fake) and not tensors.is_fake(x) and not tensors.is_fake(3)
    with tensors.fakes(real=True) as mode:
        assert tensors.is_fake(mode.from_tensor(x, static_shapes=True) + x)


def test_trees():
    tree = {"a": [1, (2, 3)], "b": 4}
    assert tensors.leaves(tree) == [1, 2, 3, 4]
    found, spec = tensors.flatten(tree)
    assert tensors.unflatten(found, spec) == tree
    assert tensors.each(lambda n: n + 1, tree) == {"a": [2, (3, 4)], "b": 5}
    output = transformers.modeling_outputs.CausalLMOutput(loss=torch.ones(()), logits=torch.ones(2))
    again = tensors.unflatten(*tensors.flatten(output))
    assert type(again) is type(output) and again.loss is output.loss, (
        "ModelOutput is no tree any more"
    )


def test_wrapper_subclasses():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(32, 32))
    assert not tensors.is_wrapper(model[0].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, Int8WeightOnlyConfig())
    assert tensors.is_wrapper(model[0].weight), (
        "torchao's weights are no wrapper subclasses any more"
    )
    weight: Any = model[0].weight
    like: Any = tensors.rebuilt(weight, torch.zeros_like)
    assert type(like) is type(weight.data) and like.shape == weight.shape
    assert not like.qdata.any() and weight.qdata.any()
    held = {id(weight.qdata), id(weight.scale)}
    assert held <= {id(t) for t in tensors.inside(weight)}, "look at __tensor_flatten__"


def test_weights_of_bitsandbytes():
    """tensors.is_packed, tensors.beside, tensors.inside: by names of theirs."""
    bits: Any = pytest.importorskip("bitsandbytes").nn
    plain = nn.Linear(64, 64, bias=False)
    assert not tensors.is_packed(plain.weight) and not tensors.beside(plain.weight)
    four, eight = bits.Linear4bit(64, 64, bias=False), bits.Linear8bitLt(64, 64, bias=False)
    eight.weight = bits.Int8Params(plain.weight.data, requires_grad=False)
    four, eight = four.to("cpu"), eight.to("cpu")
    assert tensors.is_packed(four.weight) and tensors.is_packed(eight.weight)
    state = four.weight.quant_state
    assert tensors.beside(four.weight) == {"quant_state": state}
    held = [four.weight, state.absmax, state.code, state.offset, *vars(state.state2).values()]
    found = {id(t) for t in tensors.inside(four.weight)}
    assert found == {id(t) for t in held if isinstance(t, torch.Tensor)}, "look at QuantState"
    assert {id(eight.weight.CB), id(eight.weight.SCB)} < {
        id(t) for t in tensors.inside(eight.weight)
    }
    assert "bitsandbytes::gemm_4bit" in stage._OF_OTHERS
    name = torch.ops.bitsandbytes.gemm_4bit.default.name()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"), (
        "products of four bits are no longer written in other operations: play them otherwise"
    )


# -- data parallelism ------------------------------------------------------------------------------


def test_modules_that_fully_shard_leaves_to_us(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(
            nn.Sequential(nn.Linear(2, 2), pickle.loads(pickle.dumps(Mine(2, 2)))), mesh=mesh
        )
        kinds = [isinstance(p, DTensor) for p in model.parameters()]
        assert kinds == [True, True, False, False], (
            "fully_shard cuts what it should leave alone: see _is_composable_with_fsdp"
        )
        weight = model[0].weight
        fsdp.lay(weight, torch.full((2, 2), 3.0))
        assert bool((weight.full_tensor() == 3).all()), "a DTensor's memory is not _local_tensor"
    finally:
        torch.distributed.destroy_process_group()
    plain = nn.Parameter(torch.ones(2))
    fsdp.lay(plain, torch.zeros(2))
    assert not plain.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_fsdp_has_yet_to_send(dtype, tmp_path):
    """fsdp.waits: in the dtype of the gradient they stay on the whole parameter."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = fully_shard(nn.Linear(2, 2), mesh=mesh, mp_policy=policy)
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            model(torch.ones(1, 2)).sum().backward()
            _, whole = fsdp.twins(model, False)[id(model), "weight"]
            assert whole is not None and fsdp.waits(model, whole) is not last, (
                "FSDP2 puts gradients elsewhere: look at FSDPParam.unsharded_accumulated_grad"
            )
            assert (model.weight.grad is not None) is last
    finally:
        torch.distributed.destroy_process_group()


@fsdp.leave_to_us
class Mine(nn.Linear):
    pass


def test_parameters_are_brought_up_to_date_before_they_are_listed():
    module, calls = nn.Module(), []
    modules.hold_current(module, lambda: calls.append(1))
    module.weight = nn.Parameter(torch.ones(2))
    outer = nn.Sequential(module)
    assert [n for n, _ in outer.named_parameters()] == ["0.weight"] and calls, (
        "modules.hold_current: named_parameters does not call _parameters.items()"
    )


def test_modes_of_others_do_not_see_what_is_done_undisturbed():
    with FlopCounterMode(display=False) as counter:
        with dynamo.undisturbed():
            torch.ones(2, 2) @ torch.ones(2, 2)
        assert counter.get_total_flops() == 0, "dynamo.undisturbed lets modes look"
        torch.ones(2, 2) @ torch.ones(2, 2)
        assert counter.get_total_flops() == 16


class Hollow(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func.__name__)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(func.__name__)

    def holds(self):
        return [torch.ones(3)]


def test_tensors_of_subclasses_without_memory():
    made = tensors.wrapper(Hollow, (2, 3), torch.float16, torch.device("cpu"))
    assert type(made) is Hollow and tensors.bare(made) == (2, 3), "look at _make_wrapper_subclass"
    with tensors.plainly():
        assert made.dtype == torch.float16, "look at DisableTorchFunctionSubclass"
    with pytest.raises(AssertionError):
        made.sum()
    plain = torch.ones(2)
    assert tensors.held_by(plain)[0] is plain and len(tensors.held_by(made)[0]) == 3
    assert tensors.held_by("no tensor") == []


def test_changes_in_place_are_counted():
    t, weight = torch.ones(2), nn.Parameter(torch.ones(2))
    before, stepped = tensors.version_of(t), tensors.version_of(weight)
    t.add_(1)
    assert tensors.version_of(t) != before, "look at Tensor._version"
    weight.grad = torch.ones(2)
    torch.optim.AdamW([weight], fused=True).step()
    assert tensors.version_of(weight) != stepped, "look at hooks on all optimizers' steps"
    with torch.inference_mode():
        assert tensors.version_of(torch.ones(2)) is None


def test_heads_of_others_are_known():
    from trl.trainer.utils import add_fused_lm_head

    model = make("llama")
    assert hf.chunks_its_head(model) is None
    add_fused_lm_head(model)
    assert hf.chunks_its_head(model) == "TRL", "TRL puts its fused head elsewhere"


SHARDED = """
    import sys, torch
    sys.path[:0] = ["tests"]
    from ranks import begin, shard
    from models import make
    from surgery.compat import fsdp
    from torch import distributed
    rank = begin()
    model = make("plain")
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    kind = type(model)
    shard(model)
    assert fsdp.own_class(model) is kind, "fully_shard makes its class in another way"
    seen = []
    block = model.blocks[0].up
    block.register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    for gather in (True, False):
        found = fsdp.twins(model, gather)
        sharded, shown = found[id(block), "weight"]
        assert sharded is block.weight, "fsdp.twins: sharded_param is not what the module holds"
        model(torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long))
        assert seen[-1] is shown, "fsdp.twins: _unsharded_param is not what a forward reads"
        torch.testing.assert_close(sharded.full_tensor(), whole["blocks.0.up.weight"])
    given = model(torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long))
    hooks = [*(given._backward_hooks or {}).values()]
    assert any(map(fsdp.only_announces, hooks)), "FSDP2 does not hook its outputs any more"
    assert not fsdp.only_announces(print)
    distributed.destroy_process_group()
    print("equal")
"""


def test_fsdp2_shows_the_sharded_and_the_whole_parameter(tmp_path):
    run_two_ranks(SHARDED, tmp_path)


def test_the_ddp_around_a_forward_is_found(tmp_path):
    seen = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            seen.append(fsdp.ddp_around())
            return self.layer(x)

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        outer = DistributedDataParallel(Asks(), find_unused_parameters=True)
        outer(torch.ones(1, 2))
        assert seen == [outer], "DistributedDataParallel._active_ddp_module has gone"
        assert not fsdp.joins(outer)
        with outer.join():
            assert fsdp.joins(outer), "DistributedDataParallel._join_config has gone"
        assert fsdp.ddp_around() is None and outer.find_unused_parameters
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_of_many_holds_its_share_and_says_when_memory_moves():
    """world.one_of, world.shard, world.resizing, fsdp.held_of: a group that sends nothing, and the
    functions by which FSDP2 gives memory back."""
    told: list[int] = []
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with world.one_of(4) as mesh:
        world.shard(model, ["0"], mesh)
        assert fsdp.held_of(model[0].weight).shape == (2, 8)
        with world.resizing(lambda t: told.append(t.untyped_storage().nbytes())):
            model(torch.ones(2, 8)).sum().backward()
    assert 0 in told and max(told) == 4 * 64, "FSDP2 frees what it has gathered in another way"
    assert not torch.distributed.is_initialized()
    before = len(told)
    with world.one_of(4) as mesh:
        other = nn.Sequential(nn.Linear(8, 8))
        world.shard(other, ["0"], mesh)
        other(torch.ones(2, 8)).sum().backward()
    assert len(told) == before


LEFT_OUT = """
    import sys, torch
    sys.path[:0] = ["tests"]
    from ranks import begin
    from torch import nn
    from surgery.compat import fsdp
    rank = begin()
    model = nn.ModuleDict({"own": nn.Linear(2, 2), "left": nn.Linear(2, 2)})
    nn.init.constant_(model.left.weight, float(rank))
    fsdp.leave_out_of_ddp(model, ["left.weight", "left.bias"])
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert float(model.left.weight[0, 0]) == rank, "DDP has not left it out"
    fsdp.level(wrapped, [model.left.weight.detach()])
    assert float(model.left.weight[0, 0]) == 0.0
    model.own(torch.ones(1, 2)).sum().backward()
    assert {"left.weight", "left.bias"} <= fsdp.stays_out_of_ddp(model)
    fsdp.take_back_from_ddp(model)
    assert not [key for key in vars(model) if "ddp" in key]
    print("equal")
"""


def test_ddp_leaves_out_what_it_is_told_to(tmp_path):
    run_two_ranks(LEFT_OUT, tmp_path)


def test_peft_is_known_when_it_is_there(monkeypatch):
    assert hf.has_peft() == ("peft" in sys.modules)
    monkeypatch.setitem(sys.modules, "peft", sys)
    assert hf.has_peft()


def test_a_trainer_among_the_calls_is_found():
    class Mine(transformers.Trainer):
        def __init__(self) -> None:
            self.state = transformers.TrainerState(global_step=7)

        def ask(self):
            return hf.steps_of_trainer([sys._getframe()])

    assert hf.steps_of_trainer([sys._getframe()]) == 0
    assert Mine().ask() == 7


def test_marks_of_zero():
    weight = nn.Parameter(torch.ones(2))
    assert not fsdp.is_zero(weight)
    weight.ds_id = 3  # what DeepSpeed puts on each parameter that it partitions
    assert fsdp.is_zero(weight)


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_does_for_reentrant_checkpoints_is_undone():
    model = make("llama")
    model.enable_input_require_grads()
    found = hf.Workarounds(model)
    table = model.get_input_embeddings()
    assert any(hook.__name__.startswith(hf.HOOK) for _, hook in modules.forward_hooks(table)), (
        f"transformers' hook on the embeddings is not called {hf.HOOK} any more"
    )
    found.take_off()
    assert not list(modules.forward_hooks(table))
    found.restore()
    assert len(list(modules.forward_hooks(table))) == 1
    t5 = make("t5")
    t5.gradient_checkpointing_enable({"use_reentrant": False})
    biased = hf.Workarounds(t5).biased
    assert {type(module).__name__ for module in biased} == {"T5Attention"}, (
        "no module of T5 makes a bias of its own require gradients for checkpointing any more"
    )


def test_a_function_is_compiled_for_all_shapes_and_counted_as_one():
    class Counts(TorchDispatchMode):
        count = 0

        @classmethod
        def ignore_compile_internals(cls):
            return True

        def launched(self):
            self.count += 1

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **kwargs or {})

    def work(x, key):
        x.mul_(2).add_(key)
        return x.sum()

    graph, structure = inductor.traced(work, [torch.ones(5), 3], dynamic=True)
    assert structure.is_leaf() and graph.graph.find_nodes(op="placeholder"), "look at make_fx"
    found = inductor.compiled(work, [torch.ones(5), 3], dynamic=True, count=True)
    assert isinstance(found, inductor.Made) and found.fits([torch.ones(9), 4])
    made = found.run
    for length, key in ((3, 5), (4, 7), (9, -8)):
        x = torch.ones(length)
        with Counts() as found:
            total = made(x, key)
        assert total == length * (2 + key)
        assert found.count == 1, (
            f"a counted function dispatches {found.count} operations: look at make_fx and at "
            "_disable_current_modes"
        )


def test_inductor_says_whether_it_works(monkeypatch):
    assert inductor.reason(ValueError("first\nsecond")) == "ValueError: first"
    assert inductor.works("cpu") == (shutil.which("g++") is not None)


def test_products_are_added_wider_where_torch_says_so():
    assert not tensors.adds_wider(torch.ones(2, 2))
    schema = str(torch.ops.aten.addmm.dtype_out._schema)
    assert "ScalarType out_dtype" in schema, "addmm has no out_dtype= any more"


class Seen:
    """A stage.Watcher that counts; stage.staged plays."""

    def __init__(self) -> None:
        self.alive, self.ran_flops, self.open, self.compiled = {}, 0, 0, 0

    def came(self, key, size, operation):
        self.alive[key] = size, stage.place_in_backward()

    def went(self, key):
        del self.alive[key]

    def opened(self):
        self.open += 1

    def closed(self):
        self.open -= 1

    def ran(self, operation, flops, dtype, traffic, compiled):
        self.ran_flops += flops
        self.compiled += compiled


def test_a_stage_sees_storages_come_and_go():
    """On tensors that tensors.playing takes for real ones."""
    look = "Look at torch.utils.weak and at UntypedStorage: they are freed otherwise now."
    seen = Seen()
    with stage.staged(stage.Stage(seen)):
        assert stage.current() is not None
        x, w = torch.randn(8, 16), nn.Parameter(torch.randn(16, 16))
        first = stage.place_in_forward()
        y = (x @ w).relu()
        assert stage.place_in_forward() > first, "autograd counts its nodes otherwise"
        assert tensors.is_played(y) and not tensors.is_fake(y)
        held = sum(size for size, _ in seen.alive.values())
        assert held == 4 * (8 * 16 + 16 * 16 + 8 * 16), look  # relu keeps its result only
        loss = y.sum()
        loss.backward()
        assert w.grad is not None
        places = [place for _, place in seen.alive.values() if place is not None]
        assert places and min(places) >= first, "_current_autograd_node knows no place any more"
        assert bool((w.grad > 0).all()) and loss.item() == 0.5  # what only data could tell
        del y, loss
        assert sum(size for size, _ in seen.alive.values()) == 4 * (8 * 16 + 2 * 16 * 16), look
        product = 2 * 8 * 16 * 16
        assert seen.ran_flops == 2 * product, "look at torch.utils.flop_counter.flop_registry"
    assert stage.current() is None and seen.open == 0


def test_what_runs_as_one_leaves_nothing_but_its_results():
    seen = Seen()
    here = stage.Stage(seen)
    with stage.staged(here):
        x = torch.ones(64)
        for _ in range(2):
            y = here.one("twice", "key", lambda x: (x + 1).exp() * 2, (x,))
            assert y.shape == (64,)
        assert sorted(size for size, _ in seen.alive.values()) == [256, 256]
        assert seen.compiled == 2
        assert tensors.address(x[1:]) == tensors.address(x) + 4 != tensors.address(y)
    real = torch.ones(2)
    assert tensors.address(real) == real.data_ptr()


def test_what_is_special_about_a_module_and_whose_it_is():
    """modules.is_special, hf.of_adapters: hooks in dicts by torch's names, PEFT's layers."""
    peft = pytest.importorskip("peft")
    model = Two()
    assert not any(modules.is_special(module) for module in model.modules())
    for put in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = getattr(model.layers[0], f"register_{put}_hook")(lambda *_: None)
        assert modules.is_special(model.layers[0]), f"where are {put} hooks?"
        handle.remove()
    model.layers[0].forward = model.layers[0].forward
    assert modules.is_special(model.layers[0])
    del model.layers[0].forward
    assert not hf.of_adapters(model)
    model = peft.get_peft_model(Two(), peft.LoraConfig(target_modules=["layers.0"], r=2))
    found = {name for name, m in model.named_modules() if m in hf.of_adapters(model)}
    assert "base_model.model.layers.0.lora_A.default" in found
    assert not any("base_layer" in name or "layers.1" in name for name in found)


def test_errors_are_heard_where_they_leave_backward_and_step():
    heard = []
    exhausted._last.clear()  # or the library would explain the errors, of another test's model
    hear = failures.hear.__wrapped__  # once more, beside the library's own
    engine, patch = torch.autograd._engine_run_backward, torch.optim.Optimizer._patch_step_function

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise MemoryError("of the step")

    def raising(grad: torch.Tensor) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    weight = nn.Parameter(torch.ones(2))
    try:
        hear(lambda error: heard.append(("backward", error)), lambda e: heard.append(("step", e)))
        weight.register_hook(raising)
        with pytest.raises(RuntimeError):
            weight.sum().backward()
        with pytest.raises(RuntimeError):
            torch.autograd.grad(weight.sum(), weight)
        optimizer = Broken([weight], lr=0.1)
        with pytest.raises(MemoryError):
            optimizer.step()
    finally:
        torch.autograd._engine_run_backward = engine
        torch.optim.Optimizer._patch_step_function = patch
    assert [where for where, _ in heard] == ["backward", "backward", "step"], (
        "failures.hear: look at _engine_run_backward and Optimizer._patch_step_function"
    )
    assert all(failures.is_out_of_memory(error) for _, error in heard)
    assert not failures.is_out_of_memory(RuntimeError("of shapes"))
    assert failures.passing(abs, heard.append)(-1) == 1


def test_transformers_asks_whether_a_tensor_is_fake():
    from transformers.utils import import_utils

    with tensors.fakes():
        x = torch.ones(1)
    assert import_utils.is_tracing(x), "hf.fakes_taken_for_real has nothing to do"
    with hf.fakes_taken_for_real(lambda t: False):
        assert not import_utils.is_tracing(x), "hf.fakes_taken_for_real is not asked any more"
    assert import_utils.is_tracing(x)


def test_embeddings_of_inputs_are_found_and_may_be_missing():
    """hf.input_embeddings: transformers says by an error that a model has none."""
    model = make("llama")
    assert hf.input_embeddings(model) is model.model.embed_tokens
    assert hf.input_embeddings(nn.Linear(2, 2)) is None

    class Without(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

    assert hf.input_embeddings(Without(transformers.LlamaConfig())) is None


@pytest.mark.skipif(not TAKES_ADAPTERS, reason="this transformers wants a newer PEFT")
def test_what_transformers_writes_of_a_model_with_adapters_of_its_own(tmp_path):
    from peft import LoraConfig

    model = make("llama")
    assert not hf.has_adapters(model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert hf.has_adapters(model), "transformers marks it in another way"
    with hf.without_adapters(model):
        model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "base" / "model.safetensors").is_file()
    assert [f.name for f in (tmp_path / "adapters").glob("*.safetensors")] == [
        "adapter_model.safetensors"
    ]


def test_parameters_are_held_as_ever_again():
    owner, listed = nn.Linear(2, 2), []
    modules.hold_current(owner, lambda: listed.append(1))
    modules.hold_as_ever(owner)
    assert type(owner._parameters) is dict and not listed
    assert not tensors.is_playing()
    with tensors.playing(tensors.fakes()):
        assert tensors.is_playing()
        with tensors.off_stage():
            assert torch.ones(1).item() == 1, "_disable_current_modes does not disable them"


def test_what_is_around_a_backward_a_forward_and_a_step():
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda g: seen.append((autograd.backward_now(), autograd.keeps_graph())))
    loss = x.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert autograd.backward_now() == -1
    (one, kept), (two, last) = seen
    assert -1 < one < two and (kept, last) == (True, False), "look at torch._C's graph tasks"
    transformed = []
    torch.func.grad(lambda t: transformed.append(autograd.is_transformed()) or t.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        assert autograd.is_transformed(), "look at forward_ad._current_level"
    assert transformed == [True] and not autograd.is_transformed()
    hook, other = (lambda g: g), (lambda g: -g)
    for each in (hook, other):
        x.register_hook(each)
    y = torch.ones(2, requires_grad=True)
    y.register_hook(hook)
    assert other in autograd.hooks_alone(x, [y]) and hook not in autograd.hooks_alone(x, [y])

    model = Two()
    frames = []
    model.register_forward_pre_hook(lambda *_: frames.append(modules.swaps(callers.calls())))
    torch.func.functional_call(model, {}, torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert frames == [True, False], "look at stateless._functional_call"
    before = modules.around_all([Two])
    put = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert modules.around_all([Two]) != before, "look at torch.nn's _global_forward_hooks"
    put.remove()
    assert modules.around_all([Two]) == before
    with ModuleTracker():
        watching = torch_module._global_forward_pre_hooks
        assert watching, "look at ModuleTracker: it puts no hooks on all modules"
        with modules.unwatched():
            assert not watching, "look at modules.unwatched: torch's trackers are told otherwise"
        assert watching
    layer = nn.Linear(2, 2)
    assert modules.all_held(layer)["weight"] is layer.weight, "look at Module._parameters"
    assert not modules.is_computed(layer, "weight")
    prune.identity(layer, "weight")
    assert modules.is_computed(layer, "weight"), "pruning calls what it keeps otherwise"

    optimizer, order = torch.optim.SGD(model.parameters(), lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: order.append("theirs"))
    first = lambda *_: order.append("ours")  # noqa: E731
    for _ in range(2):  # put on once
        optimizers.hear_first(optimizer, first)
    optimizer.step()
    assert order == ["ours", "theirs"], "look at Optimizer._optimizer_step_post_hooks"


def test_canary_checkpoint_blocks():
    model = make("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.checkpoint_blocks(model)
    assert model.is_gradient_checkpointing, "the newer name of gradient_checkpointing_enable moved"


def test_canary_memory_that_was_given_back():
    t = torch.ones(3)
    assert not tensors.is_given_back(t) and not tensors.is_given_back(torch.ones(0))
    t.untyped_storage().resize_(0)  # what FSDP2 does
    assert tensors.is_given_back(t)


def test_canary_hooks_of_fabric():
    fabric = pytest.importorskip("lightning_fabric")
    model = nn.Linear(2, 2)
    wrapped, _ = fabric.Fabric(accelerator="cpu").setup(model, torch.optim.SGD(model.parameters()))
    hooks = list(wrapped(torch.ones(1, 2))._backward_hooks.values())
    assert hooks and all(map(fsdp.only_announces, hooks)), "look at _FabricModule.forward"


def test_every_function_of_compat_has_a_canary():
    """By name: what no test here mentions has none."""
    here = Path(__file__).read_text()
    for found in pkgutil.iter_modules(compat.__path__):
        module = importlib.import_module(f"surgery.compat.{found.name}")
        for node in ast.parse(inspect.getsource(module)).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
            if public:
                name = f"{module.__name__.rpartition('.')[2]}.{node.name}"
                indirect = {
                    "dynamo.copy_sources",
                    "dynamo.without_source",
                    "dynamo.with_own_code",
                }
                assert name in here or name in indirect, f"{name} has no canary"


def test_importing_surgery_asks_for_no_accelerator():
    """After CUDA has been asked for its devices, DataLoader's workers cannot use it."""
    code = """
        import torch

        def asked(*args):
            raise RuntimeError("asked for accelerators")

        for name in ("is_available", "device_count", "_lazy_init", "current_device"):
            setattr(torch.cuda, name, asked)
        torch.accelerator.current_accelerator = asked
        import surgery, passes, surgery.passkit, surgery.compat.inductor, surgery.compat.fsdp
        from surgery.contract.registry import registered
        registered()
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_peft_still_has_the_class_that_reads_gradients():
    adalora = pytest.importorskip("peft.tuners.adalora")
    assert hf.wants_gradients(nn.Linear(2, 2)) is None
    assert hasattr(adalora, "AdaLoraModel"), "hf.wants_gradients would not find it"


def test_peft_still_says_what_lora_is_made_of():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["layers.0"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(Two(), config)
    ((name, (layer, kind)),) = hf.lora_layers(model).items()
    assert name == "base_model.model.layers.0" and kind is None
    ((a, b, scale),) = hf.lora_factors(layer) or []
    torch.testing.assert_close(scale * b @ a, layer.get_delta_weight("default"))
    with model.disable_adapter():
        assert hf.lora_factors(layer) is None
    model.merge_adapter()
    assert hf.lora_factors(layer) is None
    more = peft.LoraConfig(target_modules=["layers.0"], r=2, use_dora=True)
    ((_, kind),) = hf.lora_layers(peft.get_peft_model(Two(), more)).values()
    assert kind is not None and "Dora" in kind, "layer.lora_variant would not tell DoRA from LoRA"
