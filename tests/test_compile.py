"""Programs stay small: the equations of what a user waits for (experiments' counts)."""

import importlib.util
from pathlib import Path

import jax
import pytest

PLACE = Path(__file__).parent.parent / "experiments" / "bench_compile.py"
SPEC = importlib.util.spec_from_file_location("bench_compile", PLACE)
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)

MOST = {
    "flow": 820,
    "DDIM": 520,
    "Heun": 610,
    "sde": 740,
    "adaptive": 2460,
    "LinearSDE": 1430,
    "log_likelihood": 2420,
}
"""A tenth above what was reached; the hand-written scan has 259."""


@pytest.mark.parametrize("name", MOST)
def test_programs_have_at_most_so_many_equations(name, float32):
    run, arrays = bench.traced(name)
    found = bench.equations(jax.make_jaxpr(run)(arrays).jaxpr)
    print(name, found)
    assert found <= MOST[name]


def test_equations_inside_of_loops_are_counted():
    def loop(x):
        return jax.lax.scan(lambda x, _: (x * 2 + 1, None), x, length=3)[0]

    assert bench.equations(jax.make_jaxpr(loop)(1.0).jaxpr) == 3
