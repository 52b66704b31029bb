"""Optimisers: Lion's published scalar sequence, AdamW against NumPy, and the schedule.

Lion's step is a sign, so without decay its size is the learning rate of that step: the
schedule is read off the parameters, not off the code.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sdegen
from sdegen.training.optimizer import Given, global_norm

KEY = jax.random.key(0)


def plain(cls, **kwargs):
    """No clipping, no warm-up, a constant rate, decay of vectors too."""
    fixed = {"clip": 1e9, "warmup": 0, "decay": False, "mask": None}
    return cls(**fixed | kwargs)


def run(optimizer, params, grads, steps=100):
    """Parameters and states after each of `grads`."""
    chain = optimizer.transform(steps)
    step = jax.jit(chain.update)
    state, history = chain.init(params), []
    for grad in grads:
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


def moments(state):
    """The arrays of a state, without step counters."""
    return [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.floating)]


def test_lion_takes_its_published_steps():
    # systems.md, A18. Swapped betas or the moment updated first flip the second step.
    lion = plain(sdegen.Lion, learning_rate=0.1, weight_decay=0.5, b1=0.9, b2=0.99)
    history = run(lion, jnp.array([1.0]), [jnp.array([g]) for g in (1.0, -0.2, 0.0)])
    thetas = [float(params[0]) for params, _ in history]
    np.testing.assert_allclose(thetas, [0.85, 0.9075, 0.762125], rtol=0, atol=1e-12)
    ms = [float(moments(state)[0][0]) for _, state in history]
    np.testing.assert_allclose(ms, [0.01, 0.0079, 0.007821], rtol=0, atol=1e-12)


def test_lion_does_not_move_without_gradient_or_decay():
    lion = plain(sdegen.Lion, weight_decay=0.0)
    (params, _), *_ = run(lion, jnp.array([1.0, -2.0]), [jnp.zeros(2)])
    assert params.tolist() == [1.0, -2.0]  # sign(0) = 0


def test_lion_never_moves_more_than_its_rate_and_decay():
    rate, decay = 0.03, 0.7
    lion = plain(sdegen.Lion, learning_rate=rate, weight_decay=decay)
    key = jax.random.key(0)
    theta = 3 * jax.random.normal(key, (50,))
    grads = jax.random.cauchy(jax.random.fold_in(key, 1), (40, 50))  # of any size
    for new, _ in run(lion, theta, grads):
        assert (
            jnp.abs(new - theta) <= rate * (1 + decay * jnp.abs(theta)) + 1e-14
        ).all()
        theta = new


@pytest.mark.parametrize("cls, copies", [(sdegen.Lion, 1), (sdegen.AdamW, 2)])
def test_the_state_holds_so_many_copies_of_the_parameters(cls, copies):
    params = {"w": jnp.ones((3, 5), jnp.float32), "b": jnp.ones(7, jnp.float32)}
    state = plain(cls).transform(10).init(params)
    size = sum(a.nbytes for a in moments(state))
    assert size == copies * sum(a.nbytes for a in jax.tree.leaves(params))
    assert {a.dtype for a in moments(state)} == {jnp.dtype("float32")}


def adamw_by_hand(theta, grads, rate, decay, b1, b2, eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2, one coordinate after the other."""
    out = []
    theta = np.array(theta, float)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for n, g in enumerate(np.asarray(grads), 1):
        for i in range(theta.size):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] * g[i]
            m_hat, v_hat = m[i] / (1 - b1**n), v[i] / (1 - b2**n)
            step = m_hat / (np.sqrt(v_hat) + eps) + decay * theta[i]
            theta[i] = theta[i] - rate * step
        out.append(theta.copy())
    return out


def test_adamw_is_adamw():
    numbers = {"rate": 0.02, "decay": 0.3, "b1": 0.8, "b2": 0.95}
    adamw = plain(sdegen.AdamW, learning_rate=0.02, weight_decay=0.3, b1=0.8, b2=0.95)
    theta = jax.random.normal(jax.random.key(0), (4,))
    grads = jax.random.normal(jax.random.key(1), (30, 4)) + 0.5
    mine = [params for params, _ in run(adamw, theta, grads)]
    np.testing.assert_allclose(mine, adamw_by_hand(theta, grads, **numbers), rtol=1e-12)


@pytest.mark.parametrize("cls", [sdegen.Lion, sdegen.AdamW])
def test_leaves_of_a_tree_move_as_if_they_were_alone(cls):
    keys = jax.random.split(jax.random.key(0), 10)
    grads = [
        {"a": jax.random.normal(k, (3,)), "b": [jax.random.normal(k, (2, 2))]}
        for k in keys
    ]
    params = {"a": jnp.ones(3), "b": [jnp.full((2, 2), -2.0)]}
    together = run(plain(cls), params, grads)[-1][0]
    alone = run(plain(cls), params["b"][0], [g["b"][0] for g in grads])[-1][0]
    np.testing.assert_array_equal(together["b"][0], alone)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Embed(4, 3, rngs=rngs)
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.LayerNorm(2, rngs=rngs)


@pytest.mark.parametrize("cls", [sdegen.Lion, sdegen.AdamW])
def test_decay_moves_matrices_alone_unless_a_mask_says_otherwise(cls):
    """With a gradient of zero whatever moves has decayed."""
    flax = jax.tree.map(lambda a: a + 1, Layers(nnx.Rngs(0)))
    layers = eqx.nn.Embedding(4, 3, key=KEY), eqx.nn.Linear(3, 2, key=KEY)

    def moved(params, **options):
        still = jax.tree.map(jnp.zeros_like, params)
        optimizer = plain(cls, learning_rate=0.1, weight_decay=0.5, **options)
        (new, _), *_ = run(optimizer, params, [still])
        pairs = zip(*map(jax.tree.leaves_with_path, (params, new)), strict=True)
        return {jax.tree_util.keystr(p) for (p, a), (_, b) in pairs if (a != b).any()}

    matrices = cls().mask
    assert moved(flax, mask=matrices) == {".linear.kernel.value"}
    assert moved(layers, mask=matrices) == {"[1].weight"}
    assert len(moved(flax, mask=None)) == len(jax.tree.leaves(flax))
    assert moved({"a": jnp.ones(2), "b": jnp.ones(2)}, mask=only_b) == {"['b']"}


def only_b(params):
    return {"a": False, "b": True}


def rates(optimizer, steps, total):
    """The learning rate of each step, read off Lion's moves."""
    history = run(optimizer, jnp.zeros(1), [jnp.ones(1)] * steps, total)
    return -np.diff([0.0] + [float(params[0]) for params, _ in history])


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("decay", [True, False])
def test_the_rate_rises_in_a_line_and_falls_along_a_half_cosine(warmup, decay):
    lion = sdegen.Lion(0.01, weight_decay=0.0, clip=1e9, warmup=warmup, decay=decay)
    seen = rates(lion, 51, 50)
    n = np.arange(51)
    # The first step is not lost: step n of the warm-up has (n + 1) / (warmup + 1).
    np.testing.assert_allclose(
        seen[:warmup], 0.01 * (n[:warmup] + 1) / (warmup + 1), rtol=1e-6
    )
    phase = (n[warmup:] - warmup) / (50 - warmup)
    fall = np.cos(np.pi / 2 * phase) ** 2 if decay else np.ones_like(phase)
    # Optax computes schedules in float32: 3e-7.
    np.testing.assert_allclose(seen[warmup:], 0.01 * fall, rtol=1e-6, atol=1e-9)


def test_a_run_shorter_than_its_warm_up_is_all_warm_up():
    seen = rates(sdegen.Lion(0.01, weight_decay=0.0, warmup=10), 5, 5)
    np.testing.assert_allclose(seen, 0.01 * np.arange(1, 6) / 11, rtol=1e-6)


@pytest.mark.parametrize("cls, b", [(sdegen.Lion, 0.99), (sdegen.AdamW, 0.9)])
@pytest.mark.parametrize("clip, factor", [(1.0, 0.2), (5.0, 1.0), (100.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(cls, b, clip, factor):
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}  # norm 5
    _, state = run(plain(cls, clip=clip), params, [grads])[0]
    first = [float(m[0]) for m in moments(state)[:2]]
    expected = np.array([3.0, -4.0]) * factor * (1 - b)
    np.testing.assert_allclose(first, expected, rtol=1e-6)


@pytest.mark.parametrize("cls", [sdegen.Lion, sdegen.AdamW])
def test_another_learning_rate_does_not_retrace(cls):
    traces = []

    @eqx.filter_jit
    def step(optimizer, params, grads):
        traces.append(1)
        chain = optimizer.transform(10)
        updates, _ = chain.update(grads, chain.init(params), params)
        return optax.apply_updates(params, updates)

    params, grads = jnp.array([1.0, -2.0]), jnp.array([0.3, 0.1])
    moved = [
        step(plain(cls, learning_rate=rate, weight_decay=decay), params, grads) - params
        for rate, decay in ((0.1, 0.0), (0.2, 0.0), (jnp.array(0.1), 0.5))
    ]
    assert len(traces) == 1
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-12)
    np.testing.assert_allclose(moved[2] - moved[0], -0.1 * 0.5 * params, rtol=1e-12)


@pytest.mark.parametrize("cls", [sdegen.Lion, sdegen.AdamW])
def test_a_sweep_of_rates_is_a_vmap(cls):
    def end(rate):
        chain = plain(cls, learning_rate=rate).transform(10)
        params = jnp.array([1.0, -2.0])
        state = chain.init(params)
        for n in range(3):
            updates, state = chain.update(jnp.sin(params + n), state, params)
            params = optax.apply_updates(params, updates)
        return params

    many = jnp.array([1e-3, 1e-2, 0.1])
    np.testing.assert_allclose(
        jax.vmap(end)(many), jnp.stack([end(r) for r in many]), rtol=1e-13
    )


def test_a_given_transformation_is_used_as_it_is():
    (params, _), *_ = run(Given(optax.sgd(0.1)), jnp.array([1.0]), [jnp.array([2.0])])
    assert abs(float(params[0]) - 0.8) < 1e-15


def test_the_norm_is_over_all_leaves():
    norm = global_norm({"a": jnp.array([2.0, 3.0]), "b": jnp.array([[6.0]])})
    assert norm.dtype == jnp.float32 and abs(float(norm) - 7.0) < 1e-6
