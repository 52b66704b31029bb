"""Brownian increments: their law, their independence, and that a path is one path.

W over a cell of length dt is N(0, dt); the space-time Levy area H is N(0, dt/12) and
independent of W (Foster, Lyons and Oberhauser 2020, definition 3.5).
"""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sdegen.processes.brownian import GridBrownianPath, NoiseTerm, TreeBrownianPath

N = 5_000
TIMES = np.array([-1.0, -0.7, 0.5, 0.55, 3.0])
"""A grid of unequal cells that does not begin at 0."""
KINDS = {"W": dfx.BrownianIncrement, "W and H": dfx.SpaceTimeLevyArea}


def keys(n=N):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(n))


def grid_path(levy_area, n=N, shape=(2,)):
    return GridBrownianPath(jnp.asarray(TIMES), keys(n), shape, levy_area)


def tree_path(levy_area, n=N, shape=(2,), tol=1e-3):
    ends = jnp.asarray(TIMES[0]), jnp.asarray(TIMES[-1])
    return TreeBrownianPath(*ends, jnp.asarray(tol), keys(n), shape, levy_area)


PATHS = {"grid": grid_path, "tree": tree_path}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@functools.partial(jax.jit, static_argnums=3)
def between(path, a, b, use_levy):
    """The increments from each of `a` to each of `b`, in one program for many tests."""
    return jax.lax.map(lambda ab: path.evaluate(*ab, use_levy=use_levy), (a, b))


def over(path, times, use_levy=False):
    """The increments over the cells of `times`."""
    times = jnp.asarray(times)
    return between(path, times[:-1], times[1:], use_levy)


def uncorrelated(a, b):
    correlation = np.mean(a * b) / np.sqrt(np.mean(a**2) * np.mean(b**2))
    print(f"correlation {correlation:.4f}, bar {5 / np.sqrt(a.size):.4f}")
    return abs(correlation) < 5 / np.sqrt(a.size)


def normal(x, variance):
    """Mean, variance and distribution, within five standard errors."""
    x = np.asarray(x).ravel()
    mean_bar = 5 * np.sqrt(variance / x.size)
    var_bar = 5 * variance * np.sqrt(2 / x.size)
    print(
        f"mean {x.mean():.4f} (bar {mean_bar:.4f}), variance {np.mean(x**2):.4f} "
        f"(exact {variance:.4f}, bar {var_bar:.4f})"
    )
    return (
        abs(x.mean()) < mean_bar
        and abs(np.mean(x**2) - variance) < var_bar
        and scipy.stats.kstest(x / np.sqrt(variance), "norm").pvalue > 1e-6
    )


# -- the law ---------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("kind", KINDS)
def test_increments_are_normal_and_independent_from_cell_to_cell(path, kind):
    w = np.asarray(over(path(KINDS[kind]), TIMES))
    assert w.shape == (4, N, 2)
    assert all(normal(w[i], dt) for i, dt in enumerate(np.diff(TIMES)))
    assert all(uncorrelated(w[i], w[j]) for i in range(4) for j in range(i))
    # coordinates, and samples, have their own noise
    assert uncorrelated(w[0, :, 0], w[0, :, 1])
    assert uncorrelated(w[0, :-1], w[0, 1:])


@every_path
def test_levy_areas_are_normal_and_independent_of_the_increments(path):
    levy = over(path(dfx.SpaceTimeLevyArea), TIMES, use_levy=True)
    w, h = np.asarray(levy.W), np.asarray(levy.H)
    assert abs(np.asarray(levy.dt) - np.diff(TIMES)).max() < 1e-12
    assert all(normal(h[i], dt / 12) for i, dt in enumerate(np.diff(TIMES)))
    assert all(uncorrelated(h[i], h[j]) for i in range(4) for j in range(i))
    assert all(uncorrelated(w[i], h[j]) for i in range(4) for j in range(4))
    # Nor is one a function of the other.
    assert all(uncorrelated(w[i] ** 2 - dt, h[i] ** 2 - dt / 12) for i, dt in cells())


def cells():
    return enumerate(np.diff(TIMES))


@every_path
def test_the_increment_is_the_same_with_and_without_its_area(path):
    both = path(dfx.SpaceTimeLevyArea)
    with_area = over(both, TIMES, use_levy=True).W
    assert abs(with_area - over(both, TIMES)).max() < 1e-14


@every_path
def test_a_sample_has_its_own_path_whatever_its_batch(path):
    whole = path(dfx.SpaceTimeLevyArea)
    w, moved = (
        over(whole, TIMES),
        eqx.tree_at(lambda p: p.keys, whole, whole.keys[::-1]),
    )
    assert (over(moved, TIMES) == w[:, ::-1]).all()
    if path is grid_path:  # both are one function of a key under vmap
        few = path(dfx.SpaceTimeLevyArea, n=5)
        assert (over(few, TIMES) == w[:, :5]).all()


@every_path
def test_float32_paths_draw_float32(path):
    few = jax.tree.map(
        lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a,
        path(dfx.SpaceTimeLevyArea, n=3),
    )

    @jax.jit
    def cell(path):
        a, b = jnp.float32(TIMES[0]), jnp.float32(TIMES[1])
        return path.evaluate(a, b, use_levy=True)

    assert {a.dtype for a in jax.tree.leaves(cell(few))} == {jnp.dtype("float32")}


# -- one path at every step size -------------------------------------------------------


INSIDE = np.array([-1.0, -0.31, 0.77, 2.123, 3.0])
"""Times that are no nodes of the tree, but for the ends."""


@pytest.mark.parametrize("kind", KINDS)
def test_increments_of_a_tree_add_up_over_any_subdivision(kind):
    path = tree_path(KINDS[kind])
    w = over(path, INSIDE)
    first, last = np.array([0, 0, 2, 1]), np.array([4, 2, 4, 3])
    coarse = between(path, jnp.asarray(INSIDE[first]), jnp.asarray(INSIDE[last]), False)
    sums = [w[a:b].sum(0) for a, b in zip(first, last, strict=True)]
    assert abs(coarse - jnp.stack(sums)).max() < 1e-12


def test_areas_of_a_tree_add_up_over_any_subdivision():
    """int (W_r - W_s) dr over a cell from s is dt (W/2 + H), and integrals add up."""
    path = tree_path(dfx.SpaceTimeLevyArea)
    cell = over(path, INSIDE, use_levy=True)
    ends = jnp.asarray(INSIDE[[0] * 4]), jnp.asarray(INSIDE[1:])
    whole = between(path, *ends, True)  # from the start to each of the other times
    dt = np.diff(INSIDE)[:, None, None]
    before = np.cumsum(cell.W, axis=0) - cell.W  # W at the left of each cell
    total = np.cumsum(dt * (cell.W / 2 + cell.H + before), axis=0)
    span = (INSIDE[1:] - INSIDE[0])[:, None, None]
    assert abs(total - span * (whole.W / 2 + whole.H)).max() < 1e-10


ORDERS = {"Euler": (1.0, 0.2), "ShARK": (1.5, 0.25)}
"""Strong orders for additive noise, and the room for a slope fitted to 200 paths."""


@pytest.mark.parametrize("solver", ORDERS)
def test_the_same_path_at_finer_steps_converges_at_the_strong_order(solver):
    def drift(t, y, args):
        return jnp.sin(3 * y) - y

    @jax.jit
    def end(steps):
        path = tree_path(dfx.SpaceTimeLevyArea, n=200, shape=(1,), tol=2**-10)
        terms = dfx.MultiTerm(
            dfx.ODETerm(drift), NoiseTerm(lambda t, y, args: 1 + jnp.exp(-t), path)
        )
        return dfx.diffeqsolve(
            terms,
            getattr(dfx, solver)(),
            t0=0.0,
            t1=2.0,
            dt0=2.0 / steps,
            y0=jnp.ones((200, 1)),
            max_steps=512,
        ).ys[-1]

    exact = end(256)
    steps = np.array([8, 16, 32])
    errors = np.array([np.sqrt(np.mean((end(n) - exact) ** 2)) for n in steps])
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print("strong errors", errors, "order", slope)
    order, room = ORDERS[solver]
    assert abs(slope - order) < room
