"""What a run is known by: functions by what they compute, not by their names."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sdegen
from sdegen.runs.identity import comparable, identify

SCALE = 2.0


def scaled(by, default=1.0):
    def function(x):
        """Words do not count."""
        return by * x + default

    return function


def other():
    def function(x):
        """Other words."""
        return function.__name__ and x

    return function


def constant(x):
    return 1.0 + x


def uses_a_global(x):
    return SCALE * helper(x)


def helper(x):
    return x + 1


class Module(eqx.Module):
    rate: float
    function: object = eqx.field(static=True)


class Callable:
    def __init__(self, number):
        self.number = number

    def __call__(self, x):
        return self.number * self.more(x)

    def more(self, x):
        return x


class Changed(Callable):
    def more(self, x):
        return x + 1


Changed.__name__ = "Callable"
SAME = {
    "a closure": lambda: scaled(2.0),
    "a lambda": lambda: lambda x: x + 1,
    "a partial": lambda: functools.partial(constant, 3),
    "an optimiser": lambda: optax.adamw(1e-3),
    "a schedule": lambda: optax.adam(optax.cosine_decay_schedule(1e-3, 100)),
    "a module": lambda: Module(1.0, scaled(2.0)),
    "a callable": lambda: Callable(2.0),
    "a jitted function": lambda: jax.jit(scaled(2.0)),
    "an array": lambda: jnp.arange(1000.0),
    "a network": lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
}
OTHER = {
    "its closure": (scaled(2.0), scaled(3.0)),
    "an array in it": (scaled(np.arange(99)), scaled(np.arange(99)[::-1])),
    "its constants": (lambda x: x + 1, lambda x: x + 2),
    "its operations": (lambda x: x + 1, lambda x: x - 1),
    "what it calls": (lambda x: jnp.sin(x), lambda x: jnp.cos(x)),
    "its defaults": (lambda x, y=1: x + y, lambda x, y=2: x + y),
    "the code of the same name": (scaled(2.0), other()),
    "the rate of an optimiser": (optax.adam(1e-3), optax.adam(1e-1)),
    "a momentum": (optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)),
    "a static field": (Module(1.0, scaled(2.0)), Module(1.0, scaled(3.0))),
    "an attribute": (Callable(2.0), Callable(3.0)),
    "a method": (Callable(2.0), Changed(2.0)),
    "what is jitted": (jax.jit(scaled(2.0)), jax.jit(scaled(3.0))),
    "one number of many": (jnp.zeros(1000), jnp.zeros(1000).at[7].set(1.0)),
    "a partial's argument": tuple(eqx.Partial(constant, n) for n in (1, 2)),
    "the weights of a network": tuple(
        nnx.Linear(2, 2, rngs=nnx.Rngs(n)) for n in (0, 1)
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_what_is_made_twice_is_the_same(what):
    unknown = set()
    assert identify(SAME[what](), unknown) == identify(SAME[what](), unknown)
    assert not unknown


@pytest.mark.parametrize("what", OTHER)
def test_what_differs_is_told_apart(what):
    one, two = OTHER[what]
    assert identify(one) != identify(two)


def test_a_function_is_what_it_names_in_its_module(monkeypatch):
    before = identify(uses_a_global)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert identify(uses_a_global) != before
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "helper", constant)
    assert identify(uses_a_global) != before


def test_what_cannot_be_looked_into_is_named():
    unknown = set()
    identify({"a": [object()], "b": iter([])}, unknown)
    assert unknown == {"object", "list_iterator"}


def test_code_is_not_compared_between_two_pythons():
    held, own = ({"python": n, "loss": identify(constant)} for n in ("a", "b"))
    held["loss"]["code"] = "0"
    assert comparable(held, own)[0] == comparable(held, own)[1]
    held["python"] = "b"
    assert comparable(held, own)[0] != comparable(held, own)[1]


def test_library_functions_are_known_by_their_names():
    assert identify(sdegen.denoising_loss) == "denoising_loss"
