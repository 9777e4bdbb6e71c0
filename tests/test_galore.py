"""galore: the published equations written densely, P beside an exact SVD, what is never formed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from laws import method_of, state_of
from models import inputs_of, loss_of, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import passes
import surgery
from passes.galore import Gradients, frame_of, project
from surgery.memory import measure

CPU = torch.device("cpu")


def frames(model: nn.Module):
    return {c.weight: frame_of(c) for c in method_of(model, Gradients).projected}


def dense_gradients(model: nn.Module, plain: nn.Module, inputs) -> dict[str, torch.Tensor]:
    """Autograd's own gradients of the weights as they are now, as matrices (out, in)."""
    plain.load_state_dict(model.state_dict())
    plain.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss_of(plain, inputs).backward()
    turned = {n for n, f in frames(model).items() if f.transposed}
    return {
        n: (p.grad.t() if n in turned else p.grad).clone()
        for n, p in plain.named_parameters()
        if n in frames(model)
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["auto", "out", "in"])
def test_steps_are_those_of_the_paper(family, side):
    """Algorithm 1 with Adam, every matrix in full; moments kept when P is renewed, as published."""
    model, scale, lr, eps = make(family).double(), 0.25, 1e-2, 1e-3
    plain = copy.deepcopy(model)
    surgery.apply(model, "galore", rank=4, period=3, scale=scale, side=side)
    # R's gradient is the true one, scale P^T G: what the paper adds eps to is larger by 1 / scale.
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, eps=eps * scale)
    own = {n: model.get_parameter(n) for n in frames(model)}
    moments = {}
    for step in range(8):
        inputs = inputs_of(family, seed=step)
        gradients = dense_gradients(model, plain, inputs)
        before = {n: p.detach().clone() for n, p in own.items()}
        torch.manual_seed(0)
        loss_of(model, inputs).backward()
        known = {n: (f.matrix.clone(), f.left) for n, f in frames(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, (p, left) in known.items():
            assert left == {"out": True, "in": False}.get(side, _wide(model, name))
            r = p.t() @ gradients[name] if left else gradients[name] @ p
            m, v = moments.get(name, (torch.zeros_like(r), torch.zeros_like(r)))
            moments[name] = m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r * r
            n = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + eps)
            change = -lr * scale * (p @ n if left else n @ p.t())
            change = change.t() if frames(model)[name].transposed else change
            torch.testing.assert_close(own[name].detach(), before[name] + change, msg=name)


def _wide(model: nn.Module, name: str) -> bool:
    out, inputs = model.get_parameter(name).shape
    return out > inputs if frames(model)[name].transposed else out < inputs


def test_beside_the_published_code(monkeypatch):
    """Step by step, with our P: of its own SVDs other signs may come, to moments that are kept."""
    galore_torch = pytest.importorskip("galore_torch")
    projector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector
    period, options = 3, {"lr": 1e-2, "eps": 1e-30, "weight_decay": 0.0}
    ours = make("llama")
    theirs = copy.deepcopy(ours)
    surgery.apply(ours, "galore", rank=4, period=period, projection="svd")
    method = method_of(ours, Gradients)
    for each in method.projected:
        frame_of(each).turn = 0  # as published: all in one step
    names = [each.weight for each in method.projected]
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in names)
    group = {"rank": 4, "update_proj_gap": period, "scale": 0.25, "proj_type": "std"}
    targets = [theirs.get_parameter(name) for name in names]
    published = galore_torch.GaLoreAdamW(
        [{"params": targets, **group}], no_deprecation_warning=True, **options
    )
    optimizer = torch.optim.AdamW(ours.parameters(), **options)
    drawn = []

    def own_svd(self, weights, rank, type):
        p = drawn.pop(0)
        u, _, vh = torch.linalg.svd(weights, full_matrices=False)
        theirs = vh[:rank].t() if type == "right" else u[:, :rank]
        torch.testing.assert_close(p @ p.t(), theirs @ theirs.t(), rtol=1e-3, atol=1e-3)
        return p.t() if type == "right" else p

    monkeypatch.setattr(projector, "get_orthogonal_matrix", own_svd)
    for step in range(2 * period):
        for model, own in ((ours, optimizer), (theirs, published)):
            loss_of(model, inputs_of("llama", seed=step)).backward()
            if model is ours and step % period == 0:
                drawn += [frame_of(each).matrix for each in method.projected]
            own.step()
            own.zero_grad()
        assert not drawn
        for name in names:
            found, expected = ours.get_parameter(name), theirs.get_parameter(name)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=f"{step} {name}")


@pytest.mark.parametrize("projection", ["randomised", "svd"])
def test_the_subspace_is_that_of_the_gradient(projection):
    model, inputs = make("llama").double(), inputs_of("llama")
    plain = copy.deepcopy(model)
    surgery.apply(model, "galore", rank=4, projection=projection)
    gradients = dense_gradients(model, plain, inputs)
    loss_of(model, inputs).backward()
    for each in method_of(model, Gradients).projected:
        frame, gradient = frame_of(each), gradients[each.weight]
        p, side = frame.matrix, gradient if frame.left else gradient.t()
        torch.testing.assert_close(p.t() @ p, torch.eye(4, dtype=p.dtype))
        best = torch.linalg.svd(side).U[:, :4]
        if projection == "svd":
            torch.testing.assert_close(p @ p.t(), best @ best.t())
        within = (p.t() @ side).norm() / (best.t() @ side).norm()
        assert within > 0.999, (each.weight, within)
        # the gradient is that of the coordinate: d loss / dR with W = W_0 + scale P R
        r = 0.25 * (p.t() @ side)
        torch.testing.assert_close(each.parameter.grad, r if frame.left else r.t())


def _within(model: nn.Module, gradients: dict[str, torch.Tensor]) -> float:
    """The least share of a gradient's strongest directions that a frame holds."""
    found = []
    for name, frame in frames(model).items():
        side = gradients[name].double() if frame.left else gradients[name].double().t()
        best = torch.linalg.svd(side).U[:, :4]
        found.append(float((frame.matrix.double().t() @ side).norm() / (best.t() @ side).norm()))
    return min(found)


@pytest.mark.parametrize("projection", ["randomised", "svd"])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("first", ["zero", "overflow"])
def test_a_gradient_without_directions_makes_no_subspace(first, to_none, projection):
    """Of what begins at zero, and of the first steps under a GradScaler, which makes no step."""
    model, plain, inputs = make("llama"), make("llama"), inputs_of("llama")
    surgery.apply(model, "galore", rank=4, projection=projection)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, enabled=first == "overflow")
    gradients = dense_gradients(model, plain, inputs)
    for _ in range(2):
        scaler.scale(loss_of(model, inputs) * (0.0 if first == "zero" else 8.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=to_none)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    loss_of(model, inputs).backward()
    assert _within(model, gradients) > 0.999


@pytest.mark.parametrize(("inputs", "out"), [(2048, 64), (64, 2048)])
def test_products_in_float16_do_not_overflow_before_the_step_does(inputs, out):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(inputs, out)).half()
    surgery.apply(model, "galore", rank=4, targets=["0"])
    rows = torch.randn(32, 8) * torch.tensor([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    x, grad = (rows @ torch.randn(8, inputs)).half(), (rows @ torch.randn(8, out) * 2.5).half()
    y = model(x)
    (each,) = method_of(model, Gradients).projected
    y.backward(grad)
    assert each.parameter.grad.isfinite().all()
    assert _within(model, {each.weight: grad.double().t() @ x.double()}) > 0.999


class Largest(TorchDispatchMode):
    """The largest matrix that operations have made, views of a weight left out."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.numel = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensor = isinstance(result, torch.Tensor) and result.ndim == 2
        if tensor and result.data_ptr() != self.weight:
            self.numel = max(self.numel, result.numel())
        return result


class OneLinear(nn.Module):
    def __init__(self, out: int, inputs: int):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(inputs, out, bias=False)])

    def forward(self, x):
        return self.blocks[0](x).square().mean()


@pytest.mark.parametrize(("out", "inputs"), [(384, 256), (256, 384)])
def test_no_dense_gradient_is_formed_not_even_for_p(out, inputs):
    x, least = torch.randn(8, inputs), {}
    for projection in ("randomised", "random", "svd"):
        torch.manual_seed(0)
        model = surgery.apply(
            OneLinear(out, inputs), "galore", rank=4, projection=projection, targets=["blocks.0"]
        )
        with Largest(model.blocks[0].weight) as seen:
            model(x).backward()
        first = seen.numel
        with Largest(model.blocks[0].weight) as seen:
            model(x).backward()
        least[projection] = first, seen.numel
    dense, tall = out * inputs, 384 * (4 + 8)
    assert least["svd"][0] >= dense
    assert least["randomised"][0] <= tall
    assert least["random"][0] <= tall
    assert all(later <= 8 * 384 for _, later in least.values())  # rows of x or g


def test_each_weight_renews_its_subspace_in_a_step_of_its_own():
    model = surgery.apply(make("llama"), "galore", rank=4, period=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    count, seen, renewed = len(frames(model)), {}, []
    for step in range(16):
        loss_of(model, inputs_of("llama", seed=step)).backward()
        now = {n: f.matrix for n, f in frames(model).items()}
        renewed.append([n for n, p in now.items() if seen.get(n) is not p])
        seen = now
        optimizer.step()
        optimizer.zero_grad()
    assert len(renewed[0]) == count
    assert max(map(len, renewed[1:])) <= math.ceil(count / 5)
    for start in (1, 6, 11):  # each once a period
        assert sorted(n for names in renewed[start : start + 5] for n in names) == sorted(now)


@pytest.mark.parametrize("state", ["keep", "project", "reset"])
def test_what_becomes_of_the_optimizers_state(state):
    model = surgery.apply(make("llama"), "galore", rank=4, period=2, on_resample=state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        loss_of(model, inputs_of("llama", seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    each = next(c for c in method_of(model, Gradients).projected if frame_of(c).due)
    frame, held = frame_of(each), optimizer.state.get(each.parameter)
    if state == "reset":
        assert not held
        return
    m, v, old = held["exp_avg"].clone(), held["exp_avg_sq"].clone(), frame.matrix
    assert not each.parameter.any()
    loss_of(model, inputs_of("llama", seed=2)).backward()
    g = each.parameter.grad.clone()
    if state == "project":
        expected = {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        project(expected, old, frame.matrix, frame.left)
        m, v = expected.values()
    optimizer.step()
    torch.testing.assert_close(held["exp_avg"], 0.9 * m + 0.1 * g)
    torch.testing.assert_close(held["exp_avg_sq"], 0.999 * v + 0.001 * g * g)
    assert held["step"] == 3


@pytest.mark.parametrize("left", [True, False])
def test_moments_in_another_subspace(left):
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(12, 6, generator=generator).double()).Q
    old, m = frame[:, :3], torch.randn(3, 5, generator=generator).double()
    v = m.square() + 0.1

    def moved(new):
        turned = (m, v) if left else (m.t(), v.t())
        state = {"step": torch.tensor(3.0), "exp_avg": turned[0].clone()}
        state["exp_avg_sq"] = turned[1].clone()
        project(state, old, new, left)
        found = state["exp_avg"], state["exp_avg_sq"]
        return found if left else tuple(t.t() for t in found)

    for found, expected in zip(moved(old), (m, v), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(moved(old[:, [2, 0, 1]]), (m[[2, 0, 1]], v[[2, 0, 1]]), strict=True):
        torch.testing.assert_close(found, expected)
    apart = moved(frame[:, 3:])
    torch.testing.assert_close(apart[0], torch.zeros_like(m))
    torch.testing.assert_close(apart[1], v.mean(0, keepdim=True).expand_as(v))
    line = {"exp_avg": torch.ones(1, 5) if left else torch.ones(5, 1)}
    project(line, frame[:, :1], -frame[:, :1], left)
    assert (line["exp_avg"].round(decimals=4) == -1).all()
    # a vector of the whole space, seen in a subspace that holds half of it: m is its projection
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    mixed = frame @ turn[:, :3]
    torch.testing.assert_close(mixed @ moved(mixed)[0], mixed @ mixed.t() @ old @ m)


@pytest.mark.parametrize("to_none", [True, False])
def test_an_overflow_leaves_no_trace_in_the_subspace(to_none):
    model, plain = make("llama"), make("llama")
    for each in (model, plain):
        surgery.apply(each, "galore", rank=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = inputs_of("llama")
    (loss_of(model, inputs) * float("inf")).backward()
    optimizer.step()
    assert state_of(model).clock.skipped == 1
    optimizer.zero_grad(set_to_none=to_none)
    loss_of(model, inputs).backward()
    loss_of(plain, inputs).backward()
    for name, frame in frames(model).items():
        assert frame.matrix.isfinite().all()
        if to_none:
            assert torch.equal(frame.matrix, frames(plain)[name].matrix)


def test_one_subspace_for_all_backwards_of_a_step():
    model = surgery.apply(make("llama"), "galore", rank=4, period=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        loss_of(model, inputs_of("llama", seed=3 * step)).backward()
        first = {n: f.matrix for n, f in frames(model).items()}
        pair = [loss_of(model, inputs_of("llama", seed=3 * step + i)) for i in (1, 2)]
        sum(pair).backward()  # two forwards, one backward
        assert all(f.matrix is first[n] for n, f in frames(model).items())
        optimizer.step()
        optimizer.zero_grad()


def test_a_report_makes_no_subspace():
    model, inputs = surgery.apply(make("llama"), "galore", rank=4), inputs_of("llama")
    surgery.report(model, inputs)
    assert all(frame.matrix is None for frame in frames(model).values())
    with pytest.raises(surgery.SurgeryError, match=r"P of .* is computed from its first gradient"):
        c = surgery.coordinates(model)[0]
        c.expand(torch.ones_like(c.parameter))


class Two(nn.Module):
    """Of its two blocks, a loss uses one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 10), nn.Linear(12, 20)])

    def forward(self, x):
        return [block(x).square().mean() for block in self.blocks]


def test_a_weight_without_a_gradient_waits_for_one():
    model = surgery.apply(Two(), "galore", rank=4, period=2, targets=["blocks.0", "blocks.1"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start, x = model.blocks[1].weight.detach().clone(), torch.randn(8, 12)
    for used in (0, 0, 0, 1, 1):
        still = torch.equal(model.blocks[1].weight, start)
        assert still == (frames(model)["blocks.1.weight"].matrix is None)
        model(x)[used].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.blocks[1].weight, start)


@pytest.mark.parametrize("how", ["a penalty", "by hand"])
def test_gradients_of_the_weights_themselves_make_subspaces_too(how):
    """Those of a penalty that has a backward of its own, and those that are set (PCGrad)."""
    model, inputs, lr = make("llama").double(), inputs_of("llama"), 1e-2
    plain = copy.deepcopy(model)
    surgery.apply(model, "galore", rank=4, period=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(4):
        gradients = dense_gradients(model, plain, inputs)
        before = {n: model.get_parameter(n).detach().clone() for n in gradients}
        if how == "a penalty":
            sum(0.5 * model.get_parameter(n).square().sum() for n in gradients).backward()
            loss_of(model, inputs).backward()
            gradients = {n: g + before[n] for n, g in gradients.items()}
        else:
            for name, gradient in gradients.items():
                model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()
        for name, frame in frames(model).items():
            within = frame.matrix @ frame.matrix.t()
            g = gradients[name]
            change = -lr * 0.25**2 * (within @ g if frame.left else g @ within)
            torch.testing.assert_close(model.get_parameter(name).detach(), before[name] + change)
            assert frame.matrix.isfinite().all()


def test_where_lapack_does_not_converge(monkeypatch):
    def fails(*_, **__):
        raise torch.linalg.LinAlgError("linalg.svd: did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    model, plain = make("llama"), make("llama")
    surgery.apply(model, "galore", rank=4, projection="svd")
    gradients = dense_gradients(model, plain, inputs_of("llama"))
    loss_of(model, inputs_of("llama")).backward()
    for name, frame in frames(model).items():
        side = gradients[name] if frame.left else gradients[name].t()
        within = (frame.matrix.t() @ side).square().sum()
        assert within > 0.99 * torch.linalg.eigvalsh(side @ side.t())[-4:].sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_recompute_keeps_as_little_beside_it_as_alone(family):
    inputs, kept, gradients = inputs_of(family, rows=2, length=24), {}, {}
    for spec in (["recompute"], ["galore"], ["galore", "recompute"]):
        model = make(family).double()
        own = [passes.Galore(rank=4) if name == "galore" else name for name in spec]
        surgery.apply(model, own)
        loss_of(model, inputs).backward()
        kept[tuple(spec)] = measure(lambda m=model: loss_of(m, inputs), CPU).live
        gradients[tuple(spec)] = [c.parameter.grad for c in surgery.coordinates(model)]
    assert kept["galore", "recompute"] <= kept[("recompute",)] < kept[("galore",)]
    pairs = zip(gradients["galore",], gradients["galore", "recompute"], strict=True)
    for alone, beside in pairs:
        torch.testing.assert_close(alone, beside)


def test_sixteen_bits_with_the_optimizer_of_users():
    model = make("llama").bfloat16()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    surgery.apply(model, "galore", rank=4, period=2, always=".*norm.*")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    first = last = 0.0
    for _ in range(12):
        loss = loss_of(model, inputs_of("llama"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = first or loss.item(), loss.item()
    assert last < first - 0.1
    for name, frame in frames(model).items():
        moved = model.get_parameter(name).detach() != start[name]
        assert moved.float().mean() > 0.5, name
        assert frame.matrix.dtype == torch.float32


def test_misa_draws_from_its_coordinates():
    model = make("llama").double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    surgery.apply(model, [passes.Misa(budget=0.4, period=2), passes.Galore(rank=4, period=3)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(9):
        active = {c.weight for c in surgery.coordinates(model) if c.active}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss_of(model, inputs_of("llama", seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n in frames(model) if not torch.equal(model.get_parameter(n), before[n])}
        assert moved == active
    assert sum(not torch.equal(model.get_parameter(n), start[n]) for n in frames(model)) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"period": 0}, "period=0 must be at least 1 step"),
        ({"scale": -1.0}, "scale=-1.0 of the steps must be positive"),
        ({"weight_decay": math.nan}, "weight_decay=nan must be >= 0"),
        ({"side": "left"}, "side='left'"),
        ({"rank": 40}, "no trainable Linear with more than rank=40 channels on its smaller side"),
        (
            {"rank": 32, "targets": ["q_proj"]},
            "has 32 channels on its smaller side, no more than rank=32",
        ),
        ({"targets": ["embed_tokens"]}, "embed_tokens.weight belongs to Embedding"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(surgery.SurgeryError, match=message.replace("(", r"\(")):
        surgery.apply(make("llama"), "galore", **options)
