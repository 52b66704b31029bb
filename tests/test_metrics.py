"""Distances between laws: closed forms, linear programs, brute force, other libraries.

What is random is compared with exact means within four or five standard errors.
"""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
import scipy.integrate
import scipy.linalg
import scipy.optimize
import scipy.stats
from oracle import G1, G2
from scipy.spatial.distance import cdist

import sdegen
from sdegen.metrics import (
    Moments,
    density_coverage,
    energy_distance,
    fitted_gaussian_w2,
    frechet,
    gaussian_w2,
    ks,
    mmd2,
    nearest,
    path_energy,
    precision_recall,
    sinkhorn_divergence,
    sliced_w2,
    straightness,
    transport,
    w1,
    w2,
)

DATA, NOISE = np.array([[2.0, 1.2], [1.2, 1.0]]), np.diag([1.0, 0.2])
"""Two Gaussians whose covariances do not commute (G4)."""
G4_W2_SQUARED = 0.8121818105


def cloud(seed, n=40, d=3):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1)


def atoms(seed, n, d=2):
    """Points and unequal weights."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.dirichlet(np.ones(n))


def within(values, exact, bars=4):
    """Whether the mean of repeats is `exact`, within standard errors; printed."""
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    print("mean", np.mean(values), "exact", exact, "standard error", error)
    return abs(np.mean(values) - exact) < bars * error


# -- exact transport -------------------------------------------------------------------


def linear_program(cost, a, b):
    """The primal optimum over plans, by a general solver."""
    n, m = cost.shape
    marginals = np.concatenate(
        [np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))]
    )
    return scipy.optimize.linprog(
        cost.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b]), method="highs"
    ).fun


def kantorovich_rubinstein(cost, a, b):
    """max E_a h - E_b h over h(u) - h(v) <= cost(u, v): the dual that sets g = -f."""
    n = len(cost)
    pairs = list(itertools.permutations(range(n), 2))
    rows = np.zeros((len(pairs), n))
    for row, (u, v) in zip(rows, pairs, strict=True):
        row[u], row[v] = 1, -1
    return -scipy.optimize.linprog(
        b - a,
        A_ub=rows,
        b_ub=[cost[p] for p in pairs],
        bounds=[(0, 0)] + [(None, None)] * (n - 1),
        method="highs",
    ).fun


@pytest.mark.parametrize("empty", [(), (2, 5)], ids=["", "atoms of weight 0"])
@pytest.mark.parametrize("p", [1, 2, 3])
def test_plan_and_potentials_certify_each_other(p, empty):
    (x, a), (y, b) = atoms(0, 7), atoms(1, 9)
    a[list(empty)] = b[list(empty)] = 0
    a, b = a / a.sum(), b / b.sum()
    found, cost = transport(x, y, p=p, x_weights=a, y_weights=b), cdist(x, y) ** p
    assert found.plan.min() >= 0
    assert abs(found.plan.sum(1) - a).max() < 1e-12
    assert abs(found.plan.sum(0) - b).max() < 1e-12
    assert (found.f[:, None] + found.g - cost).max() < 1e-12
    assert abs(a @ found.f + b @ found.g - found.cost) < 1e-9
    assert abs(np.sum(found.plan * cost) - found.cost) < 1e-12
    assert abs(linear_program(cost, a, b) - found.cost) < 1e-9
    assert abs(found.distance**p - found.cost) < 1e-12


def test_one_potential_is_enough_only_where_the_cost_is_a_metric():
    (x, a), (y, b) = atoms(2, 7), atoms(3, 9)
    y = y + [2, 0]
    points = np.concatenate([x, y])
    a_all, b_all = np.append(a, np.zeros(9)), np.append(np.zeros(7), b)
    distances = cdist(points, points)
    first = transport(x, y, p=1, x_weights=a, y_weights=b)
    second = transport(x, y, p=2, x_weights=a, y_weights=b)
    assert abs(kantorovich_rubinstein(distances, a_all, b_all) - first.cost) < 1e-9
    short = kantorovich_rubinstein(distances**2, a_all, b_all)
    print("squared cost:", second.cost, "with g = -f:", short)
    assert short < 0.7 * second.cost


@pytest.mark.parametrize("p, distance", [(1, w1), (2, w2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_on_the_line_quantiles_solve_the_linear_program(p, distance, weighted):
    for seed in range(5):
        (x, a), (y, b) = atoms(seed, 7, 1), atoms(seed + 50, 11, 1)
        given = {"x_weights": a, "y_weights": b} if weighted else {}
        if not weighted:
            a, b = np.full(7, 1 / 7), np.full(11, 1 / 11)
        exact = linear_program(cdist(x, y) ** p, a, b) ** (1 / p)
        assert abs(distance(x, y, **given) - exact) < 1e-10
        assert abs(transport(x, y, p=p, **given).distance - exact) < 1e-10


@pytest.mark.parametrize("distance", [w1, w2])
def test_unequal_numbers_are_equal_numbers_of_copies(distance):
    for d in (1, 2):
        x, y = cloud(0, 6, d), cloud(1, 9, d)
        copies = distance(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0))
        assert abs(distance(x, y) - copies) < 1e-12


@pytest.mark.parametrize("p, distance", [(1, w1), (2, w2)])
def test_the_matching_is_found_by_brute_force_and_by_the_simplex_method_too(
    p, distance
):
    x, y = cloud(3, 6), cloud(4, 6)
    best = min(
        np.mean(np.linalg.norm(x - y[list(order)], axis=1) ** p)
        for order in itertools.permutations(range(6))
    )
    assert abs(distance(x, y) - best ** (1 / p)) < 1e-12
    assert abs(transport(x, y, p=p).distance - best ** (1 / p)) < 1e-12


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_transport_does_not_depend_on_the_units(scale):
    (x, a), (y, b) = atoms(4, 7), atoms(5, 9)
    here = transport(x, y, x_weights=a, y_weights=b)
    there = transport(scale * x, scale * y, x_weights=a, y_weights=b)
    assert abs(there.distance / scale - here.distance) < 1e-12
    assert abs((a @ there.f + b @ there.g) / scale**2 - here.cost) < 1e-9


@pytest.mark.parametrize("distance", [w1, w2])
def test_a_set_is_at_no_distance_from_itself_in_any_order(distance):
    for d in (1, 3):
        x = cloud(0, d=d)
        assert distance(x, x) == 0
        assert distance(x, x[::-1]) == 0
    assert transport(x, np.concatenate([x, x])).distance < 1e-12


@pytest.mark.parametrize("distance", [w1, w2])
def test_the_distance_of_a_shifted_set_is_the_shift(distance):
    # Translations are optimal: E|x - y|^p >= |E x - E y|^p.
    for d in (1, 3):
        x, shift = cloud(0, d=d), np.array([0.3, -2.0, 0.6])[:d]
        assert abs(distance(x + shift, x) - np.linalg.norm(shift)) < 1e-12


def test_normal_laws_on_the_line_have_their_closed_forms():
    q = (np.arange(100_000) + 0.5) / 100_000
    z = scipy.stats.norm.ppf(q)
    # W_2^2 = (m1 - m2)^2 + (s1 - s2)^2; the tails beyond the last quantile are cut
    assert abs(w2(z, 1 + 2 * z) - np.sqrt(2)) < 1e-4
    rng = np.random.default_rng(0)
    draws = [w1(rng.normal(size=500), 3 + rng.normal(size=400)) for _ in range(50)]
    assert within(draws, 3.0)


@pytest.mark.parametrize("distance", [w1, w2])
def test_transport_distances_are_metrics(distance):
    for seed in range(10):
        x, y, z = (cloud(3 * seed + k, n, 2) for k, n in enumerate((10, 12, 12)))
        assert abs(distance(x, y) - distance(y, x)) < 1e-12
        assert distance(x, z) <= distance(x, y) + distance(y, z)
        assert distance(x, y) > 0.1


@pytest.mark.parametrize("d", [1, 3])
def test_the_floor_of_two_sets_of_one_law_falls_slowly_in_many_dimensions(d):
    """E W_1 between two sets of n uniform points: n^(-1/max(d, 2)) but for d = 2.

    In the cube the boundary matters less and less; the slope is within 0.05 of it.
    """
    rng, sizes = np.random.default_rng(0), [64, 128, 256, 512]
    floors = [
        np.mean([w1(*rng.random((2, n, d))) for _ in range(300 if d == 1 else 6)])
        for n in sizes
    ]
    slope = np.polyfit(np.log(sizes), np.log(floors), 1)[0]
    print("floors", floors, "slope", slope)
    assert abs(slope + 1 / max(d, 2)) < 0.05


def test_points_may_be_images():
    x, y = cloud(5, 6, 4), cloud(6, 6, 4)
    assert w2(x.reshape(6, 2, 2, 1), y.reshape(6, 2, 2, 1)) == w2(x, y)


def test_without_pot_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    x, y = cloud(0, 6), cloud(1, 9)
    assert w2(x, y[:6]) > 0 and w2(x[:, 0], y[:, 0]) > 0
    with pytest.raises(ImportError, match=r"POT.*pip install 'sdegen\[ot\]'"):
        w2(x, y)


def test_pot_is_imported_where_it_is_used():
    code = "import sys, sdegen.metrics; print('ot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# -- sliced ----------------------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(30, 30), (12, 18), (7, 40), (1, 5)])
def test_on_the_line_every_slice_is_the_distance_itself(n, m):
    x, y = cloud(0, n, 1), cloud(1, m, 1) ** 3
    value, error = sliced_w2(jax.random.key(0), x, y, 8)
    assert abs(value - w2(x, y)) < 1e-12
    assert error < 1e-7


def test_slices_of_unequal_numbers_are_those_of_copies():
    key, x, y = jax.random.key(1), cloud(0, 6), cloud(1, 9)
    copies = sliced_w2(key, np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0))
    assert abs(sliced_w2(key, x, y).value - copies.value) < 1e-12


def test_sliced_shift_and_scale_have_their_closed_forms():
    x, shift = cloud(2), np.array([0.3, -2.0, 0.6])
    value, error = sliced_w2(jax.random.key(2), x + shift, x, 4000)
    print(value, np.linalg.norm(shift) / np.sqrt(3), error)
    assert abs(value - np.linalg.norm(shift) / np.sqrt(3)) < 4 * error
    # a projection of (2 x, x): E <theta, x>^2 = |x|^2 / d
    value, error = sliced_w2(jax.random.key(3), 2 * x, x, 4000)
    assert abs(value - np.sqrt(np.mean(np.sum(x**2, 1)) / 3)) < 4 * error


def test_the_error_of_a_sliced_distance_is_its_spread():
    x, y = cloud(3), cloud(4) + 1
    draws = [sliced_w2(jax.random.key(s), x, y, 64) for s in range(200)]
    spread = np.std([d.value for d in draws], ddof=1)
    ratio = np.mean([d.error for d in draws]) / spread
    print("stated over measured:", ratio)  # of 200 draws: 5 % of noise
    assert 0.8 < ratio < 1.25


def test_a_sliced_distance_is_zero_for_one_set_and_grows_with_a_shift(float32):
    key, x = jax.random.key(5), cloud(5).astype(np.float32)
    assert sliced_w2(key, x, x[::-1]) == (0, 0)
    values = [float(sliced_w2(key, x + s, x).value) for s in (0.5, 1.0, 2.0)]
    assert values == sorted(values) and values[0] > 0
    # far from the origin, with points that float32 holds exactly there
    x = np.round(8 * x) / 8
    here, far = (sliced_w2(key, x + 1 + s, x + s).value for s in (0, 2**17))
    assert abs(far / here - 1) < 1e-6
    assert sliced_w2(key, x, x).value.dtype == jnp.float32


# -- Gaussian --------------------------------------------------------------------------


def sqrtm_formula(m1, c1, m2, c2):
    root = scipy.linalg.sqrtm(c1 @ c2)
    return np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * np.real(root))


def test_two_gaussians_that_do_not_commute():
    zero = np.zeros(2)
    assert abs(gaussian_w2(zero, DATA, zero, NOISE) ** 2 - G4_W2_SQUARED) < 1e-10
    shift = np.array([3.0, -1.0])
    shifted = gaussian_w2(zero, DATA, shift, NOISE) ** 2
    assert abs(shifted - G4_W2_SQUARED - 10) < 1e-9


def test_gaussians_agree_with_the_product_root_and_with_pot():
    rng = np.random.default_rng(0)
    for d in (1, 3, 20):
        (m1, m2), roots = rng.normal(size=(2, d)), rng.normal(size=(2, d, d))
        c1, c2 = roots @ roots.transpose(0, 2, 1)
        ours = gaussian_w2(m1, c1, m2, c2) ** 2
        assert abs(ours / sqrtm_formula(m1, c1, m2, c2) - 1) < 1e-10
        theirs = ot.gaussian.bures_wasserstein_distance(m1, m2, c1, c2) ** 2
        assert abs(ours / theirs - 1) < 1e-10


def test_singular_covariances_are_nothing_special():
    # Laws on lines at an angle t: W_2^2 = a^2 + b^2 - 2 a b |cos t|
    a, b, t = 1.5, 0.7, 2.1
    u, v, zero = np.array([1.0, 0.0]), np.array([np.cos(t), np.sin(t)]), np.zeros(2)
    found = gaussian_w2(zero, a**2 * np.outer(u, u), zero, b**2 * np.outer(v, v))
    assert abs(found**2 - (a**2 + b**2 - 2 * a * b * abs(np.cos(t)))) < 1e-12
    # The same in 50 dimensions, where rounding of 49 zeros must not add up, and to the
    # standard normal: a^2 + 50 - 2 a
    line, zeros = np.random.default_rng(0).normal(size=50), np.zeros(50)
    line = a * line / np.linalg.norm(line)
    found = gaussian_w2(zeros, np.outer(line, line), zeros, np.eye(50)) ** 2
    assert abs(found - (a**2 + 50 - 2 * a)) < 1e-10
    point = gaussian_w2(zero, 0 * DATA, zero, DATA)
    assert abs(point**2 - np.trace(DATA)) < 1e-12
    assert gaussian_w2(zero, 0 * DATA, zero, 0 * DATA) == 0


def test_close_gaussians_keep_their_digits():
    zero, h = np.zeros(2), 1e-9  # W_2 of S and (1 + h)^2 S is h sqrt(tr S)
    found = gaussian_w2(zero, DATA, zero, (1 + h) ** 2 * DATA)
    assert abs(found / (h * np.sqrt(3.0)) - 1) < 1e-5
    assert gaussian_w2(zero, DATA, zero, DATA) < 1e-14


def test_fitted_gaussians_of_samples_find_the_law():
    roots = [np.linalg.cholesky(c) for c in (DATA, NOISE)]
    x, y = (  # means and covariances of these four points are exact
        np.sqrt(1.5) * np.concatenate([root.T, -root.T]) + 5 for root in roots
    )
    assert abs(fitted_gaussian_w2(x, y) ** 2 - G4_W2_SQUARED) < 1e-9


# -- entropic --------------------------------------------------------------------------


def entropic_cost(x, y, eps):
    """The primal value of a plan by POT: <P, C> + eps KL(P | a b)."""
    cost, a, b = cdist(x, y, "sqeuclidean"), ot.unif(len(x)), ot.unif(len(y))
    plan = ot.sinkhorn(
        a, b, cost, eps, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000
    )
    return (
        np.sum(plan * cost) + eps * scipy.special.rel_entr(plan, np.outer(a, b)).sum()
    )


@pytest.mark.parametrize("eps", [2.5, 10.0])
def test_the_sinkhorn_divergence_has_the_primal_value(eps):
    x, y = cloud(0, 12, 2), cloud(1, 17, 2) + 0.5
    exact = (
        entropic_cost(x, y, eps)
        - (entropic_cost(x, x, eps) + entropic_cost(y, y, eps)) / 2
    )
    found = sinkhorn_divergence(x, y, regularisation=eps, tolerance=1e-8)
    assert found.converged and found.regularisation == eps
    assert abs(found.value - exact) < 1e-8
    default = sinkhorn_divergence(x, y, regularisation=eps)
    assert default.iterations < found.iterations
    assert abs(default.value - exact) < 1e-3 * eps


def test_the_sinkhorn_divergence_lies_between_its_limits():
    x, y = cloud(2, 20, 2), cloud(3, 15, 2) + 1
    wide = sinkhorn_divergence(x, y, regularisation=1e6)
    assert abs(wide.value - np.sum((x.mean(0) - y.mean(0)) ** 2)) < 1e-3
    narrow = sinkhorn_divergence(x, y, regularisation=0.01, max_iterations=20_000)
    assert narrow.converged
    # The sets to themselves take some 50 iterations: all three have to converge.
    few = sinkhorn_divergence(x, y, regularisation=0.01, max_iterations=100)
    assert not few.converged and few.iterations == 100
    assert sinkhorn_divergence(x, x, regularisation=0.01, max_iterations=100).converged
    # 0 <= OT_eps - W_2^2 <= eps log n
    assert abs(narrow.value - w2(x, y) ** 2) < 0.01 * np.log(20)


def test_the_sinkhorn_divergence_of_a_set_from_itself_and_from_its_shift():
    x, shift = cloud(4, 30), np.array([0.3, -2.0, 0.6])
    assert sinkhorn_divergence(x, x).value == 0
    values = []
    for s in (0.5, 1.0, 2.0):  # translations split off exactly, at any eps
        found = sinkhorn_divergence(x + s * shift, x, tolerance=1e-6)
        assert abs(found.value - s**2 * np.sum(shift**2)) < 1e-6
        values.append(found.value)
    assert values == sorted(values)
    y = cloud(5, 20)
    scale = np.mean(cdist(y, y, "sqeuclidean"))
    assert abs(sinkhorn_divergence(x, y).regularisation - 0.05 * scale) < 1e-12
    forth = sinkhorn_divergence(x, y, regularisation=1.0).value
    assert abs(forth - sinkhorn_divergence(y, x, regularisation=1.0).value) < 1e-12


def test_the_gradient_of_the_sinkhorn_divergence_is_that_of_differences():
    x, y = jnp.asarray(cloud(6, 5, 2)), jnp.asarray(cloud(7, 6, 2))

    def value(x):
        return sinkhorn_divergence(x, y, regularisation=0.5, tolerance=1e-10).value

    gradient, direction = jax.grad(value)(x), jnp.asarray(cloud(8, 5, 2))
    difference = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert abs(jnp.sum(gradient * direction) - difference) < 1e-6


def test_a_sinkhorn_divergence_that_fails_says_so_and_raises_nothing(float32):
    x, y = (jnp.asarray(cloud(s, 10), jnp.float32) for s in (8, 9))
    inside = jax.jit(lambda x, y: sinkhorn_divergence(x, y, max_iterations=3))
    short = inside(x, y)
    assert not short.converged and short.iterations == 3
    missing = sinkhorn_divergence(x.at[0, 0].set(jnp.nan), y)
    assert not missing.converged and jnp.isnan(missing.value)
    assert missing.iterations < 100  # and stops at once
    assert not sinkhorn_divergence(x, jnp.ones((4, 3))).converged  # eps = 0
    good = sinkhorn_divergence(x, y)
    assert good.converged and good.value.dtype == jnp.float32


# -- averages over pairs ---------------------------------------------------------------


def test_mmd2_is_the_double_sum_over_distinct_points():
    x, y, h = cloud(7, 5), cloud(8, 6), 1.7

    def k(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * h**2))

    xx = np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    yy = np.mean([k(a, b) for a, b in itertools.permutations(y, 2)])
    xy = np.mean([k(a, b) for a, b in itertools.product(x, y)])
    assert abs(mmd2(x, y, bandwidth=h) - (xx + yy - 2 * xy)) < 1e-14


def test_the_energy_distance_is_the_double_sum_over_distinct_points():
    x, y = cloud(7, 5), cloud(8, 6)
    xx, yy = (
        np.mean([np.linalg.norm(a - b) for a, b in itertools.permutations(z, 2)])
        for z in (x, y)
    )
    xy = np.mean([np.linalg.norm(a - b) for a, b in itertools.product(x, y)])
    assert abs(energy_distance(x, y) - (2 * xy - xx - yy)) < 1e-13


def test_long_sets_are_summed_in_parts():
    x, y = cloud(1, 2500, 1), cloud(2, 1100, 1) + 1
    v_statistic = scipy.stats.energy_distance(x[:, 0], y[:, 0]) ** 2
    bias = sum(cdist(z, z).mean() / (len(z) - 1) for z in (x, y))
    assert abs(energy_distance(x, y) - (v_statistic - bias)) < 1e-12
    assert abs(nearest(x, y) - cdist(x, y).min(axis=1).mean()) < 1e-12


def test_the_bandwidth_is_the_median_distance_of_the_second_set():
    x, y = cloud(7, 9), cloud(8, 6)  # 15 pairs: an odd number, one median
    pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(y, 2)]
    expected = mmd2(x, y, bandwidth=float(np.median(pairs)))
    assert mmd2(x, y) == pytest.approx(expected, rel=1e-12)


def folded(mean, variance):
    """E|N(mean, variance)|."""
    law, s = scipy.stats.norm, np.sqrt(variance)
    return 2 * s * law.pdf(mean / s) + mean * (1 - 2 * law.cdf(-mean / s))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_averages_over_pairs_have_the_closed_forms_of_normal_laws(shift):
    # k_h * N(m, v): E k(a, b) = h / sqrt(h^2 + v) exp(-m^2 / (2 (h^2 + v)))
    h, rng = 1.0, np.random.default_rng(1)
    same = h / np.sqrt(h**2 + 2)
    mmd = 2 * same * (1 - np.exp(-(shift**2) / (2 * (h**2 + 2))))
    energy = 2 * folded(shift, 2) - 2 * folded(0, 2)
    sets = [(shift + rng.normal(size=20), rng.normal(size=15)) for _ in range(300)]
    # A fixed bandwidth: one estimated from y is no longer independent of it.
    mmds = [mmd2(x, y, bandwidth=h) for x, y in sets]
    energies = [energy_distance(x, y) for x, y in sets]
    assert within(mmds, mmd) and within(energies, energy)
    if shift == 0:  # unbiased, so on both sides of 0
        assert min(mmds) < 0 < max(mmds) and min(energies) < 0 < max(energies)


@pytest.mark.parametrize("distance", [mmd2, energy_distance])
def test_averages_over_pairs_grow_with_the_shift(distance):
    x, y = cloud(9, 60, 2), cloud(10, 60, 2)
    values = [distance(x + shift, y) for shift in (0.5, 1.0, 2.0, 4.0)]
    assert values == sorted(values) and values[0] > 0


# -- paths -----------------------------------------------------------------------------


def independent_normals(frames):
    """x_t = x_0 sqrt((1 - t)^2 + t^2), at the two points with E x_0^2 = 1."""
    t = np.linspace(0, 1, frames)
    return np.sqrt((1 - t) ** 2 + t**2)[:, None, None] * [[1.0], [-1.0]], t


def test_the_straightness_of_two_independent_normals_is_2_minus_pi_over_2():
    errors = [
        2 - np.pi / 2 - straightness(*independent_normals(n + 1)) for n in (20, 40)
    ]
    print(errors)
    assert 0 < errors[1] < 1e-3
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.05
    # the ends are equal: all energy is wasted
    energy = path_energy(*independent_normals(1000))
    assert abs(energy.excess - (2 - np.pi / 2)) < 1e-5 and energy.w2_squared == 0
    assert energy.normalised == np.inf


def rectified_gaussian(frames):
    """The exact 1-rectified flow from NOISE at t = 0 to DATA at t = 1, at 4 points.

    They have the mean 0 and the covariance of the law, so quadratic means are exact.
    """

    def velocity(t, x):
        cov = (1 - t) ** 2 * NOISE + t**2 * DATA
        slope = (t * DATA - (1 - t) * NOISE) @ np.linalg.inv(cov)
        return (slope @ x.reshape(2, -1)).ravel()

    root = np.sqrt(2) * np.linalg.cholesky(NOISE)
    start, t = np.concatenate([root, -root], axis=1), np.linspace(0, 1, frames)
    path = scipy.integrate.solve_ivp(
        velocity, (0, 1), start.ravel(), t_eval=t, rtol=1e-11, atol=1e-12
    )
    return path.y.T.reshape(frames, 2, 4).transpose(0, 2, 1), t


def test_a_rectified_flow_of_gaussians_is_neither_straight_nor_optimal():
    frames, t = rectified_gaussian(801)
    ends = np.mean(np.sum((frames[-1] - frames[0]) ** 2, axis=1))
    assert abs(ends - 1.0861817309) < 1e-8
    assert abs(straightness(frames, t) - 0.66823) < 1e-5
    found = path_energy(frames, t, w2_squared=G4_W2_SQUARED)
    assert abs(found.energy - (1.0861817309 + 0.66823)) < 1e-5
    assert abs(found.excess - (found.energy - G4_W2_SQUARED)) < 1e-12
    assert abs(found.normalised - found.excess / G4_W2_SQUARED) < 1e-12
    # reflow: straight lines between the same ends, and still not optimal
    lines, times = frames[[0, -1]], np.array([0.0, 1.0])
    assert straightness(lines, times) == 0
    found = path_energy(lines, times, w2_squared=G4_W2_SQUARED)
    assert abs(found.excess - (1.0861817309 - G4_W2_SQUARED)) < 1e-8


def test_the_clock_may_fall_and_be_of_any_length_and_uneven():
    frames, t = rectified_gaussian(401)
    energy, curve = path_energy(frames, t), straightness(frames, t)
    assert np.allclose(path_energy(frames, 7 - 5 * t), energy, rtol=1e-12)
    assert abs(straightness(frames, 7 - 5 * t) - curve) < 1e-12
    backwards = path_energy(frames[::-1], t[::-1])
    assert np.allclose(backwards, energy, rtol=1e-12)
    uneven = np.sort(np.random.default_rng(0).choice(399, 300, False)) + 1
    kept = np.concatenate([[0], uneven, [400]])
    assert abs(straightness(frames[kept], t[kept]) - curve) < 1e-4
    assert abs(path_energy(frames[kept], t[kept]).energy - energy.energy) < 1e-4


def test_the_trajectory_of_a_sampler_has_the_straightness_of_its_law():
    # Every sample keeps its quantile: x_t = m(t) + s(t) z with m linear in t.
    path, start = sdegen.RectifiedFlow(), jnp.array([[1.0], [-1.0]])  # E z^2 = 1
    out = sdegen.sample(
        jax.random.key(0),
        G2.denoiser(path),
        (2, 1),
        grid=sdegen.FlowTimeGrid(100),
        start=start,
        trajectory=True,
    )

    def slope(t):  # s(t)^2 = (1 - t)^2 / 4 + t^2
        return (t - (1 - t) / 4) / np.sqrt((1 - t) ** 2 / 4 + t**2)

    t = float(path.t_min)  # where the sampler stops; the clock is stretched
    energy = (1 - t) * scipy.integrate.quad(lambda t: slope(t) ** 2, t, 1)[0]
    exact = energy - (1 - np.sqrt((1 - t) ** 2 / 4 + t**2)) ** 2
    assert out.times[0] > out.times[-1]
    found = straightness(out.trajectory, out.times)
    print("straightness", found, "exact", exact)
    assert abs(found / exact - 1) < 1e-3


def test_points_that_go_straight_to_their_partners_have_no_excess():
    x, y = cloud(0, 20, 2), cloud(1, 20, 2)
    partners = y[transport(x, y).plan.argmax(axis=1)]
    t = np.linspace(0, 1, 5)

    def lines(end):
        return (1 - t)[:, None, None] * x + t[:, None, None] * end

    best, other = path_energy(lines(partners), t), path_energy(lines(y), t)
    assert abs(best.excess) < 1e-12 and best.normalised < 1e-12
    assert straightness(lines(y), t) < 1e-12
    assert abs(other.w2_squared - w2(x, y) ** 2) < 1e-12 and other.excess > 0.1


# -- Kolmogorov and Smirnov ------------------------------------------------------------


def test_the_ks_statistic_is_the_largest_gap():
    found = ks(np.array([0.4, 0.1, 0.7]), lambda x: np.clip(x, 0, 1))
    assert abs(found.statistic - 0.3) < 1e-15  # just after 0.7, F_n = 1
    low = ks(np.array([[0.6], [0.9]]), lambda x: jnp.clip(x, 0, 1))
    assert abs(low.statistic - 0.6) < 1e-15  # just before 0.6, F_n = 0


def test_the_p_value_is_uniform_for_the_law_and_small_for_another():
    draws = np.asarray(G1.sample(jax.random.key(0), 200 * 100)).reshape(200, 100)
    p_values = [ks(x, G1.cdf).p_value for x in draws]
    print(
        "shares below 0.1, 0.5:", *(np.mean(np.less(p_values, q)) for q in (0.1, 0.5))
    )
    for q in (0.1, 0.5):
        error = np.sqrt(q * (1 - q) / 200)
        assert abs(np.mean(np.less(p_values, q)) - q) < 4 * error
    shifts = [ks(draws[:10].ravel() + s, G1.cdf).statistic for s in (0, 0.2, 0.4, 0.8)]
    assert shifts == sorted(shifts)
    assert ks(draws.ravel() + 0.05, G1.cdf).p_value < 1e-6


# -- features --------------------------------------------------------------------------


@jax.jit
def layer(images):
    """A small network of fixed weights: 7 features of an 8 x 8 image."""
    kernel = jax.random.normal(jax.random.key(0), (64, 7)) / 8
    return jax.nn.relu(images.reshape(len(images), -1) @ kernel)


def images(seed, n, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, 8, 8, 1))


def test_the_frechet_distance_of_features_is_that_of_other_codes():
    real, fake = images(0, 230), images(1, 170, 1.3)
    f, g = (np.asarray(layer(z)) for z in (real, fake))
    exact = sqrtm_formula(f.mean(0), np.cov(f.T), g.mean(0), np.cov(g.T))
    found = frechet(real, fake, features=layer, batch_size=50, progress=False)
    assert abs(found - exact) < 1e-10
    theirs = ot.gaussian.empirical_bures_wasserstein_distance(f, g, reg=0)
    assert abs(found / theirs**2 - 1) < 0.02  # its covariances divide by n
    kept = Moments.of(f[:100]) + Moments.of(f[100:])
    again = frechet(kept, fake, features=layer, batch_size=1000, progress=False)
    assert abs(again - exact) < 1e-10


def test_features_see_one_shape_of_batch():
    shapes = []

    def features(batch):
        shapes.append(batch.shape)
        return layer(batch)

    frechet(images(0, 70), images(1, 64), features=features, batch_size=32)
    assert set(shapes) == {(32, 8, 8, 1)} and len(shapes) == 5


def test_the_frechet_distance_is_zero_for_one_set_and_grows_with_a_shift():
    x = images(2, 300)
    assert frechet(x, x[::-1]) < 1e-20
    values = [frechet(x, x + s) for s in (0.1, 0.2, 0.4)]
    assert np.allclose(values, 64 * np.square([0.1, 0.2, 0.4]), rtol=1e-9)


def test_the_frechet_distance_of_one_law_falls_like_one_over_n():
    rng, law = np.random.default_rng(3), (lambda n: rng.normal(size=(n, 5)))
    floors = [
        np.mean([frechet(law(n), law(n)) for _ in range(200)]) for n in (100, 400)
    ]
    print("floors", floors)
    assert abs(np.log(floors[0] / floors[1]) / np.log(4) - 1) < 0.1


def test_moments_merge_in_any_order():
    parts = [100 + cloud(s, n) for s, n in ((0, 1), (1, 30), (2, 7))]
    whole = np.concatenate(parts)
    a, b, c = map(Moments.of, parts)
    for merged in (a + b + c, c + (a + b), b + c + a):
        assert merged.count == 38
        assert np.allclose(merged.mean, whole.mean(0), rtol=1e-14)
        assert np.allclose(merged.cov, np.cov(whole.T), rtol=1e-12)


# -- neighbours ------------------------------------------------------------------------


def test_nearest_is_the_mean_distance_to_the_closest_point():
    x, y = cloud(11, 7), cloud(12, 9)
    assert nearest(x, np.concatenate([y, x])) == 0
    expected = np.mean([min(np.linalg.norm(a - b) for b in y) for a in x])
    assert abs(nearest(x, y) - expected) < 1e-14
    assert nearest(np.zeros((3, 1, 1)), np.array([[[3.0]], [[-2.0]]])) == 2


def test_balls_of_neighbours_counted_by_hand():
    real, fake = np.array([0.0, 1.0, 3.0, 10.0]), np.array([3.5, 4.0, 17.0, 20.0])
    # real balls [-1, 1], [0, 2], [1, 5], [3, 17]: the fake lie in 2, 2, 1, 0 of them,
    # 17 on the edge
    assert precision_recall(real, fake, k=1).precision == 3 / 4
    assert density_coverage(real, fake, k=1) == (5 / 4, 2 / 4)
    # fake balls [3, 4], [3.5, 4.5], [14, 20], [17, 23]: 3 is on the edge, others out
    assert precision_recall(real, fake, k=1).recall == 1 / 4
    assert precision_recall(fake, real, k=1) == (1 / 4, 3 / 4)


@pytest.mark.parametrize("n, m, k, d", [(40, 40, 5, 2), (30, 60, 3, 10)])
def test_density_and_coverage_of_one_law_have_means_free_of_the_law(n, m, k, d):
    rng = np.random.default_rng(0)
    draws = [
        density_coverage(*(rng.normal(size=(s, d)) for s in (n, m)), k=k)
        for _ in range(300)
    ]
    # all of the k nearest of n - 1 + m others are real
    missed = np.prod([(n - i) / (n + m - i) for i in range(1, k + 1)])
    assert within([draw.density for draw in draws], 1.0)
    assert within([draw.coverage for draw in draws], 1 - missed)


def test_a_lost_mode_costs_recall_and_coverage_and_blur_costs_precision():
    rng = np.random.default_rng(1)
    centres = np.repeat([[-10.0, 0.0], [10.0, 0.0]], 200, axis=0)
    real, good = centres + rng.normal(size=(2, 400, 2))
    lost, blurred = (
        good - 20 * (good > 5) * [1, 0],
        good + 8 * rng.normal(size=(400, 2)),
    )
    (p, r), (d, c) = precision_recall(real, good), density_coverage(real, good)
    (p_lost, r_lost), (_, c_lost) = (
        metric(real, lost) for metric in (precision_recall, density_coverage)
    )
    p_blur, (d_blur, _) = (
        precision_recall(real, blurred).precision,
        density_coverage(real, blurred),
    )
    assert p > 0.9 and r > 0.9 and abs(d - 1) < 0.1 and c > 0.9
    assert p_lost > 0.9 and r_lost < 0.52 and c_lost < 0.52
    assert p_blur < 0.4 * p and d_blur < 0.2 * d
    assert precision_recall(real, real + 1000) == (0, 0)
    assert density_coverage(real, real + 1000) == (0, 0)


# -- bad input -------------------------------------------------------------------------

X = cloud(0, 6)
NAN = np.where(np.arange(6)[:, None] == 2, np.nan, X)
ON_SETS = [w1, w2, transport, mmd2, energy_distance, fitted_gaussian_w2, frechet]
ON_SETS += [nearest, precision_recall, density_coverage]


@pytest.mark.parametrize("metric", ON_SETS, ids=lambda f: f.__name__)
def test_bad_sets_get_a_sentence(metric):
    with pytest.raises(ValueError, match="1 of 6 points that are not finite"):
        metric(X, NAN)
    with pytest.raises(ValueError, match="holds no point"):
        metric(X, X[:0])
    with pytest.raises(ValueError, match=r"same space|one dimension"):
        metric(X, X[:, :2])


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: w2(X, X.reshape(6, 1, 3)), "same space"),
        (lambda: w2(X, X, x_weights=np.ones(6)), "sum to 1, .* a sum of 6"),
        (lambda: w1(X, X, y_weights=np.ones(5) / 5), "each of the 6 points"),
        (lambda: w1(X, X, x_weights=np.array([2, -1, 0, 0, 0, 0.0])), "non-negative"),
        (lambda: transport(X, X, p=0), "p > 0"),
        (lambda: energy_distance(X, X[:1]), "y needs 2 points or more"),
        (lambda: mmd2(X, X[:1]), "y needs 2 points or more"),
        (lambda: mmd2(X, 0 * X), "bandwidth > 0"),
        (lambda: sliced_w2(jax.random.key(0), X, X[:, :2]), "same space"),
        (lambda: sliced_w2(jax.random.key(0), X, X, 1), "at least 2 directions"),
        (lambda: sinkhorn_divergence(X, X[:, :2]), "same space"),
        (lambda: sinkhorn_divergence(X, X, regularisation=0), "take w2"),
        (lambda: precision_recall(X, X, k=6), "less than the number"),
        (lambda: density_coverage(X, X, k=0), "at least 1"),
        (lambda: gaussian_w2(X[0], DATA, X[0], DATA), r"shape \(d, d\)"),
        (lambda: gaussian_w2(X[0, :2], -DATA, X[0, :2], DATA), "negative eigenvalue"),
        (lambda: gaussian_w2(X[0, :2], X[:2, :2], X[0, :2], DATA), "symmetric"),
        (lambda: fitted_gaussian_w2(X, X[:1]), "2 points or more"),
        (lambda: frechet(X, X[:1]), "2 points or more"),
        (lambda: frechet(X, X, features=lambda x: x[:, 0]), "Pool over"),
        (lambda: Moments.of(X) + Moments.of(X[:, :2]), "one space"),
        (lambda: ks(X, G1.cdf), "on the line"),
        (lambda: ks(X[:, 0], lambda x: 2 + x**2), "rise from 0 to 1"),
        (lambda: ks(X[:, 0], lambda x: np.array(0.5)), "as many probabilities"),
        (lambda: straightness(X[None], np.zeros(1)), "two or more frames"),
        (lambda: straightness(X[:, None], np.array([0, 1, 1, 2, 3, 4])), "equal times"),
        (lambda: path_energy(NAN[:, None], np.arange(6)), "not finite"),
    ],
)
def test_a_bad_argument_gets_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
