"""GraphedStep where there is no graph: on a CPU it takes the very steps of an ordinary loop."""

import pytest
import torch
from test_optimizer import batch, make_network
from torch import nn

import jackpot_kernels as jk
from jackpot_kernels.search import GraphedStep


def loss_fn(model, x, y):
    return 30 * nn.functional.cross_entropy(model(x), y)


def test_takes_the_steps_of_a_loop():
    ours, plain = make_network(), make_network()
    optimizer, wanted = (jk.SRPopup(model, total_steps=8) for model in (ours, plain))
    step = GraphedStep(optimizer, lambda x, y: loss_fn(ours, x, y), warm_up=1)
    for t in range(8):
        for group in (*optimizer.param_groups, *wanted.param_groups):
            group["lr"] = 0.1 / (t + 1)
        x, y = batch(t)
        wanted.zero_grad()
        loss = loss_fn(plain, x, y)
        loss.backward()
        wanted.step()
        got = step(x, y)
        assert torch.equal(got, loss) and not got.requires_grad
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RuntimeError, match="total_steps = 8 steps, got one more"):
        step(*batch(8))


def test_returns_what_compute_returns():
    model = make_network()
    step = GraphedStep(
        jk.SRPopup(model, total_steps=2), lambda x, y: (loss_fn(model, x, y), model(x).argmax(1))
    )
    loss, classes = step(*batch(0))
    assert loss.shape == () and classes.shape == (16,)


def test_scales_the_loss():
    ours, plain = make_network(), make_network()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = GraphedStep(jk.SRPopup(ours, total_steps=4), lambda x, y: loss_fn(ours, x, y), scaler)
    wanted = GraphedStep(jk.SRPopup(plain, total_steps=4), lambda x, y: loss_fn(plain, x, y))
    for t in range(4):
        assert torch.equal(step(*batch(t)), wanted(*batch(t)))
    assert all(map(torch.equal, ours.state_dict().values(), plain.state_dict().values()))


def captured_step(model, optimizer):
    optimizer.zero_grad()
    with optimizer.capturing():
        loss_fn(model, *batch(0)).backward()
        optimizer.step()


def test_host_work_around_a_capture_and_a_replay():
    """Without a graph in between, a capture takes a step and a replay none."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    captured_step(model, optimizer)
    assert optimizer.is_captured
    optimizer.param_groups[0]["lr"] = 0.25
    before = model.conv.mask_words._version
    with optimizer.replaying():
        assert optimizer._hyper[0, 0] == 0.25
    assert optimizer.is_captured
    assert model.conv.mask_words._version > before
    optimizer._calls = 3
    optimizer._search["control"][0] = 3
    with pytest.raises(RuntimeError, match="got one more"), optimizer.replaying():
        raise AssertionError("must not come here")


def test_notices_effective_weights_that_a_graph_does_not_know():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    captured_step(model, optimizer)
    assert optimizer.is_captured
    model.conv.effective_weight(torch.float64)
    assert not optimizer.is_captured


def test_notices_memory_that_a_graph_does_not_know():
    """A replay would write to what was freed since."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    assert not optimizer.is_captured
    captured_step(model, optimizer)
    state = optimizer.state_dict()
    assert optimizer.is_captured
    optimizer.load_state_dict(state)
    assert not optimizer.is_captured
    for layer in jk.masked_layers(model).values():
        layer._effective = None  # as under the fused backend, which keeps none
    captured_step(model, optimizer)
    assert optimizer.is_captured
    model.conv.mask_words = model.conv.mask_words.clone()
    assert not optimizer.is_captured


@pytest.mark.parametrize("how", ["other dtype", "moved", "written to", "elsewhere"])
def test_notices_weights_that_a_graph_does_not_know(how):
    """What the fused kernels read is the weight, or a cast of it that the layer keeps."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    captured_step(model, optimizer)
    for layer in jk.masked_layers(model).values():
        layer._effective = None
        with torch.autocast("cpu", torch.bfloat16):
            layer._cast_weight()
    with optimizer.capturing():
        pass
    assert optimizer.is_captured
    if how == "other dtype":
        with torch.autocast("cpu", torch.float16):
            model.conv._cast_weight()
    elif how == "moved":
        model.to("cpu")
    elif how == "written to":
        model.conv.weight.data.mul_(2)
        model.conv.weight.mul_(2)
    else:
        model.conv._cast = None
        with optimizer.capturing():
            pass
        model.conv.weight.data = model.conv.weight.data.clone()
    assert not optimizer.is_captured


def test_learning_rates_stay_out_of_a_capture():
    """A replay would read the tensor that was the learning rate then."""
    model, lr = make_network(), torch.tensor(0.25)
    optimizer = jk.SRPopup(model, lr, total_steps=3)
    with optimizer.capturing():
        lr.fill_(0.5)
        loss_fn(model, *batch(0)).backward()
        optimizer.step()
        assert optimizer._hyper[0, 0] == 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
    with optimizer.replaying():
        assert optimizer._hyper[0, 0] == 0.125


def test_a_capture_looks_at_changed_masks_beforehand(monkeypatch):
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    model.conv.mask = model.conv.mask
    with optimizer.capturing():
        monkeypatch.setattr(optimizer, "_require_num_kept", lambda words: pytest.fail("waits for the device"))
        loss_fn(model, *batch(0)).backward()
        optimizer.step()


def test_captures_no_shapes_that_were_not_warmed_up(monkeypatch):
    """Such as those of the last batch of an epoch: no other batch would then be replayed."""
    step, seen = GraphedStep(torch.optim.SGD([torch.zeros(1)]), lambda x: x, warm_up=2), []

    def capture(inputs):
        step._graph, step._inputs = "a graph", list(inputs)

    monkeypatch.setattr(step, "_capture", capture)
    monkeypatch.setattr(step, "_eager_step", lambda inputs: seen.append(("eager", len(inputs[0]))))
    monkeypatch.setattr(step, "_replay", lambda inputs: seen.append(("replay", len(inputs[0]))))
    for size in (4, 4, 3, 4, 3):
        step._step_on_device((torch.zeros(size),))
    assert seen == [("eager", 4), ("eager", 4), ("eager", 3), ("replay", 4), ("eager", 3)]


def test_takes_no_inputs():
    model = make_network()
    step = GraphedStep(jk.SRPopup(model, total_steps=2), lambda: loss_fn(model, *batch(0)))
    assert step().shape == ()


def test_refuses_no_warm_up():
    with pytest.raises(ValueError, match="warm_up must be at least 1, got 0"):
        GraphedStep(jk.SRPopup(make_network(), total_steps=1), lambda x: x, warm_up=0)
