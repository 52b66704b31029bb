"""A place where one training run is killed many times.

It imports everything once and forks a child for each life of the run, so that a life
costs no start of Python; the JAX backend is only started in the children. Called as

    python nursery.py DIRECTORY SEED SIGNAL [SIGNAL ...]

it kills the run in DIRECTORY by each SIGNAL in turn, at random moments spread over the
whole run, and lets it end. It prints the exit codes of all lives as JSON.

    python nursery.py DIRECTORY --process NUMBER PORT

is one of two processes of one run, which is told to stop half-way.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

import sdegen
from sdegen import mesh, nets, prediction
from sdegen.training import ema as average

STEPS, CALL = 240, 4


def train(directory, **options):
    """The run: a small flow with two averages, augmentation and labels."""
    random_, spec = np.random.default_rng(0), os.environ.get("NURSERY_MESH")
    data = random_.integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    cond = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    network = nets.init(
        lambda rngs: nets.MLP((4, 4, 1), width=32, depth=1, cond_dim=3, rngs=rngs),
        jax.random.key(0),
    )
    model = sdegen.Denoiser(network, sdegen.VP(), prediction.v, 0.6)
    with sdegen.Recorder(directory, {"name": "nursery"}, resume=True) as recorder:
        return sdegen.fit(
            model,
            data,
            cond=cond,
            steps=STEPS,
            batch_size=16,
            steps_per_call=CALL,
            ema=[0.99, average.Power(0.05), average.Power(0.10)],
            augment=flip,
            accumulate=2,
            mesh=mesh.make_mesh(spec) if spec else None,
            directory=directory,
            save_every=3 * CALL,
            snapshot_every=5 * CALL,
            recorder=recorder,
            progress=False,
            **options,
        )


def flip(key, x):
    """Left and right exchanged, for half of the keys."""
    return jax.numpy.where(jax.random.bernoulli(key), x[:, ::-1], x)


def live(directory):
    """One life of the run, in a child; its process number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        train(directory)
    except SystemExit as stop:
        os._exit(stop.code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def lines(directory, name="rows.jsonl"):
    place = Path(directory) / name
    return place.read_text().count("\n") if place.exists() else 0


def together(directory, number, port):
    """One of two processes of a run; process 0 is told to stop half-way."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))

    def watch(step, _):
        if step >= STEPS // 2 and int(number) == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    train(directory, watch=watch, watch_every=CALL)


def main(directory, seed, *signals):
    draw, codes = random.Random(int(seed)), []
    total = STEPS // CALL
    for k, number in enumerate(map(int, signals)):
        # Anywhere from the first call to nearly the last, in between two writes or in
        # the middle of one.
        target = 1 + int((total - 3) * (k + draw.random()) / len(signals))
        # Told before it trains, a run just ends; then it would have nothing to save.
        told, before = number == signal.SIGTERM, lines(directory, "timing.jsonl")
        pid, ended = live(directory), 0
        while not ended and (
            lines(directory) < target
            or (told and lines(directory, "timing.jsonl") <= before)
        ):
            ended, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)
        time.sleep(0.05 * draw.random())
        if not ended:
            os.kill(pid, number)
            _, status = os.waitpid(pid, 0)
        codes.append(os.waitstatus_to_exitcode(status))
    _, status = os.waitpid(live(directory), 0)
    codes.append(os.waitstatus_to_exitcode(status))
    print(json.dumps(codes))


if __name__ == "__main__":
    if sys.argv[2] == "--process":
        together(sys.argv[1], *sys.argv[3:])
    else:
        main(*sys.argv[1:])
