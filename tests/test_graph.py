"""GraphedStep where there is no graph: on a CPU it takes the very steps of an ordinary loop."""

import weakref

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
    """Without a graph around it, a capture takes a step, and a replay takes none."""
    optimizer.zero_grad()
    with optimizer.capturing() as captured:
        loss_fn(model, *batch(0)).backward()
        optimizer.step()
    return captured


def test_host_work_around_a_capture_and_a_replay():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    captured = captured_step(model, optimizer)
    assert captured.is_current
    optimizer.param_groups[0]["lr"] = 0.25
    before = model.conv.mask_words._version
    with captured.replaying():
        assert optimizer._hyper[0, 0] == 0.25
    assert captured.is_current
    assert model.conv.mask_words._version > before
    optimizer._calls = 3
    optimizer._search["control"][0] = 3
    with pytest.raises(RuntimeError, match="got one more"), captured.replaying():
        raise AssertionError("must not come here")


def test_notices_effective_weights_that_a_graph_does_not_know():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=3)
    captured = captured_step(model, optimizer)
    assert captured.is_current
    model.conv.effective_weight(torch.float64)
    assert not captured.is_current


def test_notices_memory_that_a_graph_does_not_know():
    """A replay would write to what was freed since."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4)
    captured = captured_step(model, optimizer)
    state = optimizer.state_dict()
    assert captured.is_current
    optimizer.load_state_dict(state)
    assert not captured.is_current
    for layer in jk.masked_layers(model).values():
        layer._effective = None  # as under the fused backend, which keeps none
    captured = captured_step(model, optimizer)
    assert captured.is_current
    model.conv.mask_words = model.conv.mask_words.clone()
    assert not captured.is_current
    captured = captured_step(model, optimizer)
    assert captured.is_current
    model.conv.scores.data = model.conv.scores.data.clone()
    assert not captured.is_current


def test_each_of_two_captures_knows_its_own_memory():
    """As with two shapes of inputs, one of which is captured anew before the other is replayed."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4)
    captures = [captured_step(model, optimizer) for _ in range(2)]
    model.conv.effective_weight(torch.float64)
    again = captured_step(model, optimizer)
    assert again.is_current and not any(captured.is_current for captured in captures)


def test_layers_that_the_optimizer_leaves_alone_are_captured_too():
    model = make_network()
    assert not model.head.scores.requires_grad
    optimizer = jk.SRPopup(model, total_steps=3)
    captured = captured_step(model, optimizer)
    read = weakref.ref(model.head.effective_weight())
    with torch.no_grad():
        model.head.weight.mul_(2)
    model(batch(0)[0])
    assert not captured.is_current and read() is not None
    del captured
    assert read() is None


def test_the_layers_of_another_optimizer_are_captured():
    model = make_network()
    model(batch(0)[0])
    sgd = torch.optim.SGD([model.conv.bias])
    step = GraphedStep(sgd, lambda x, y: loss_fn(model, x, y), model=model)
    with step._capturing() as captured:
        pass
    with captured.replaying():
        assert captured.is_current
    model.conv.effective_weight(torch.float64)
    assert not captured.is_current


def test_a_capture_patches_no_stale_weight():
    """Such as that of a layer which the captured forward pass does not run: nobody else would keep it."""
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=4)
    stale = weakref.ref(model.conv.effective_weight())
    with torch.no_grad():
        model.conv.weight.mul_(2)
    with optimizer.capturing() as captured:
        for layer in jk.masked_layers(model).values():
            layer.scores.grad = torch.ones_like(layer.scores)
        optimizer.step()
    assert captured.is_current and stale() is None


def test_a_loss_scale_that_a_replay_writes_is_taken_back():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    captured = captured_step(model, optimizer)
    del optimizer.grad_scale, optimizer.found_inf
    for lr in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        with captured.replaying():
            optimizer._hyper[:, 4] = optimizer._group_hyper[:, 4] = 2**-10  # as the graph does
    for layer in jk.masked_layers(model).values():
        layer.scores.grad = torch.ones_like(layer.scores)
    optimizer.step()
    assert (optimizer._hyper[:, 4] == 1).all() and optimizer._hyper[0, 0] == 0.2


def test_a_step_that_fails_leaves_no_loss_scale_to_the_next():
    model = make_network()
    optimizer = jk.SRPopup(model, total_steps=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = GraphedStep(optimizer, lambda x, y: loss_fn(model, x, y), scaler)
    step(*batch(0))
    with pytest.raises(RuntimeError, match="got one more"):
        step(*batch(1))
    assert not vars(optimizer).keys() & {"grad_scale", "found_inf"}


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
    with optimizer.capturing() as captured:
        pass
    assert captured.is_current
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
        with optimizer.capturing() as captured:
            pass
        model.conv.weight.data = model.conv.weight.data.clone()
    assert not captured.is_current


def test_learning_rates_stay_out_of_a_capture(monkeypatch):
    """A replay would read the tensor that was the learning rate then."""
    monkeypatch.setattr("jackpot_kernels.search.optimizer._stays_on_device", torch.is_tensor)
    model, lr = make_network(), torch.tensor(0.25)
    optimizer = jk.SRPopup(model, lr, total_steps=3)
    with optimizer.capturing() as captured:
        lr.fill_(0.5)
        loss_fn(model, *batch(0)).backward()
        optimizer.step()
        assert optimizer._hyper[0, 0] == 0.25
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
    with captured.replaying():
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
