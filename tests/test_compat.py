"""What may change under the package: each private part of a library, and old names."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdegen
from sdegen import _compat
from sdegen.__main__ import _COMMANDS as COMMANDS
from sdegen.__main__ import main

OLD = [
    (room, old, new) for room, t in _compat._RENAMED.items() for old, new in t.items()
]


def find(name):
    """What a dotted name means: an attribute after `import sdegen`, or a module."""
    found = sdegen
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            return importlib.import_module(name)
        found = getattr(found, part)
    return found


# -- old names -------------------------------------------------------------------------


def test_every_old_name_says_the_new_one_and_that_exists():
    assert len(OLD) >= 60
    for room, old, new in OLD:
        if f"{room}.{old}" in _compat._ALIASES:
            continue
        with pytest.raises(AttributeError, match=rf"{room}.{old} is now {new}\.$"):
            getattr(sys.modules[room], old)
        assert find(new) is not None


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'sdegen' has no attribute 'vpp'"):
        sdegen.vpp  # noqa: B018


def test_udm_is_still_there_with_a_warning():
    with pytest.warns(DeprecationWarning, match="sdegen.udm is now sdegen.corruption"):
        assert sdegen.udm.Mask is sdegen.corruption.Mask


def test_functions_and_their_rooms_have_names_of_their_own():
    assert callable(sdegen.check) and sdegen.checks.PARTS
    assert callable(sdegen.sweep) and sdegen.sweeps.Sweep is sdegen.Sweep
    assert sdegen.nets.MLP and sdegen.data.digits and sdegen.metrics.w2
    assert sdegen.__version__ == importlib.metadata.version("sdegen")


# -- optional packages -----------------------------------------------------------------


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(ImportError) as caught:
        _compat.need("absent", "a picture", extra="plot", hint="Look away.")
    text = "a picture needs absent, which is not installed: "
    assert str(caught.value) == f"{text}pip install 'sdegen[plot]'. Look away."
    with pytest.raises(ImportError, match="board needs b-pack.*: pip install b-pack.$"):
        _compat.need("absent", "the board", package="b-pack")
    assert _compat.need("json", "a row") is importlib.import_module("json")


# -- the command -----------------------------------------------------------------------


def test_the_command_lists_its_commands_and_imports_none(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (module, _) in COMMANDS.items():
        assert f"\n  {name} " in text
        assert callable(importlib.import_module(f"sdegen.{module}").main)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sdegen {sdegen.__version__}\n"
    assert main(["chek"]) == 2
    assert "got 'chek'. Did you mean check?" in capsys.readouterr().err
    assert main([]) == 2


def test_a_command_without_its_package_ends_with_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "sdegen.sweeps.command", raising=False)
    assert main(["sweep", "file.py"]) == 1
    assert "error: the command line needs tyro" in capsys.readouterr().err


@pytest.mark.parametrize("room", ["checks", "runs", "sweeps"])
def test_a_room_is_a_command_too(room):
    words = [sys.executable, "-m", f"sdegen.{room}", "--help"]
    root = Path(__file__).parent.parent
    done = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and not done.stderr, done.stderr


# -- JAX -------------------------------------------------------------------------------


def test_a_bilinear_primitive_has_values_derivatives_and_batches():
    def outer(x, w):
        return x @ w

    def batch(arguments, axes):
        (x, w), (i, j) = arguments, axes
        if j is not None:
            return jax.vmap(outer, (i, j))(x, w), 0
        return jnp.moveaxis(x, i, 0) @ w, 0

    transposes = (lambda dy, x, w: dy @ w.T, lambda dy, x, w: x.T @ dy)
    product = _compat.bilinear_primitive("test_product", outer, transposes, batch)
    x, w = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    assert jnp.array_equal(product(x, w), x @ w)
    assert "test_product" in str(jax.make_jaxpr(product)(x, w))
    loss = lambda f: lambda x, w: jnp.sum(f(x, w) ** 2)  # noqa: E731
    found = jax.jit(jax.grad(loss(product), (0, 1)))(x, w)
    for one, other in zip(found, jax.grad(loss(outer), (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(one, other)
    xs = jnp.stack([x, 2 * x])
    assert jnp.array_equal(jax.vmap(product, (0, None))(xs, w), xs @ w)


def test_processes_agree_through_multihost_utils():
    tools = _compat.multihost_utils
    assert tools.broadcast_one_to_all(np.int32(3)) == 3
    assert tools.process_allgather(np.int32(2)).tolist() in (2, [2])
    tools.sync_global_devices("test")


# -- Diffrax ---------------------------------------------------------------------------


def test_tableaus_say_what_a_step_costs():
    """What `solvers.solve` reads of a solver's tableau, none of which is documented."""
    assert dfx.Tsit5.tableau.num_stages == 7 and dfx.Tsit5.tableau.fsal
    assert not dfx.Heun.tableau.fsal
    assert dfx.SRA1.tableau.coeffs_hh is not None
    assert dfx.SRA1.tableau.coeffs_kk is None
    assert dfx.ShARK.tableau.b_error is not None
    assert len(dfx.ShARK.tableau.b_sol) == 2
    assert dfx.ShARK.tableau.ignore_stage_f is None


def test_a_result_is_chosen_on_the_device():
    results = dfx.RESULTS
    chosen = jax.jit(lambda p: results.where(p, results.successful, results.nonfinite))
    assert chosen(True) == results.successful
    assert chosen(False) == results.nonfinite


# -- Orbax -----------------------------------------------------------------------------


def test_orbax_keeps_its_json_where_it_is_read(tmp_path, float32):
    from sdegen.runs.checkpoint import Checkpoints

    kept = Checkpoints(tmp_path / "run", identity={"a": 1})
    kept.save(7, {"x": jnp.arange(3)})
    kept.close()
    assert kept.metadata(7)["identity"] == {"a": 1}
    text = _compat.orbax_metadata(tmp_path / "run" / "7")
    assert '"identity"' in text and _compat.orbax().CheckpointManager


# -- Optuna ----------------------------------------------------------------------------


def test_a_trial_that_is_given_back_waits_again():
    optuna = pytest.importorskip("optuna", minversion="5.0")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    trial = study.ask()
    assert _compat.trial_id(trial) == trial.number == 0
    seen = []
    storage = SimpleNamespace(
        get_heartbeat_stale_trial_callback=lambda: lambda *given: seen.append(given)
    )
    _compat.requeue(study, storage, trial)
    assert seen == [(study, trial)]
    from sdegen.sweeps.storage import open_storage

    storage = open_storage("sqlite://", 30, 120)
    assert callable(storage.get_heartbeat_stale_trial_callback())
    for name in ("record_heartbeat", "remove_session", "set_trial_state_values"):
        assert callable(getattr(storage, name))
