"""Draws docs/floors.svg, the rooms of the package on their floors, from its imports.

    python docs/floors.py

The floors are those of `tests/test_layout.py`, the arrows are read with `ast`. An arrow
that follows from others (A uses B, B uses C, so A may use C) is left out.
"""

import ast
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH, HEIGHT, BOX, GAP = 1000, 52, 196, 40
ROOMS = {  # the middle of the box, from 0 to 1, and what is in the room
    "typing.py": (0.38, "array types"),
    "_compat.py": (0.88, "private names of libraries"),
    "runs": (0.62, "rows, checkpoints, reports"),
    "processes": (0.38, "noise, paths, predictions"),
    "metrics": (0.62, "distances between samples"),
    "mesh.py": (0.88, "device meshes"),
    "solvers": (0.38, "one file a solver, time grids"),
    "nets": (0.88, "architectures"),
    "losses": (0.38, "losses, weights, couplings"),
    "models": (0.38, "a network with its process"),
    "data": (0.62, "data sets and streams"),
    "likelihood": (0.14, "log p(x), bits, bounds"),
    "sampling": (0.38, "from noise to data"),
    "corruption": (0.14, "blur, masks, edits"),
    "guidance": (0.38, "conditions, inverse problems"),
    "training": (0.70, "fit, optimisers, averages"),
    "checks": (0.38, "tests of a process"),
    "cli.py": (0.70, "a dataclass as flags"),
    "sweeps": (0.70, "many trials"),
    "__init__.py": (0.38, "the public names"),
    "__main__.py": (0.70, "the command sdegen"),
}


def floors():
    """The floor of every room, from the table that the layout test keeps."""
    for node in ast.parse((ROOT / "tests/test_layout.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "FLOORS":
            table = ast.literal_eval(node.value)
            return {r.strip("/"): n for n, rooms in table.items() for r in rooms}
    raise SystemExit("tests/test_layout.py has no table FLOORS.")


def imports(rooms):
    """{room: the rooms that its files import from}."""
    found, package = {room: set() for room in rooms}, ROOT / "sdegen"
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).parts
        if parts[0] not in rooms:
            raise SystemExit(f"{parts[0]} is on no floor of tests/test_layout.py.")
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            above = parts[: len(parts) - node.level] if node.level else ()
            names = [*above, *(node.module or "").split(".")]
            if not node.level and names.pop(0) != "sdegen":
                continue
            tops = [n for n in names if n][:1] or [alias.name for alias in node.names]
            found[parts[0]] |= {n if n in rooms else f"{n}.py" for n in tops}
    return {room: used - {room} for room, used in found.items()}


def reduced(graph):
    """The arrows that do not follow from others."""

    def below(room):
        return graph[room].union(*map(below, graph[room]))

    return [
        (room, used)
        for room in graph
        for used in sorted(graph[room])
        if not any(used in below(other) for other in graph[room])
    ]


def lane(start, end, between, taken):
    """Where a long arrow passes the floors between, right of or left of their boxes."""
    free = [
        x
        for x in range(12, WIDTH - 12, 4)
        if all(abs(x - ROOMS[r][0] * WIDTH) > BOX / 2 + 10 for r in between)
        and all(abs(x - other) > 10 for other in taken)
    ]
    return min(free, key=lambda x: abs(x - start) + abs(x - end))


def arrow(room, used, floor, y, taken):
    """The path of an arrow: between neighbours of one floor, or down."""
    (x, end), half = (ROOMS[r][0] * WIDTH for r in (room, used)), BOX / 2
    if floor[room] == floor[used]:
        x, end = (x + half, end - half - 4) if end > x else (x - half, end + half + 4)
        return f"M{x:.0f} {y(floor[room]) + HEIGHT / 2:.0f} H{end:.0f}"
    points = [(x, y(floor[room]) + HEIGHT)]
    if between := [r for r in floor if floor[used] < floor[r] < floor[room]]:
        x = lane(x, end, between, taken)
        taken.append(x)
        points += [(x, y(floor[room] - 1)), (x, y(floor[used] + 1) + HEIGHT)]
    points.append((end, y(floor[used]) - 4))
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x0, y0), (x1, y1) in pairwise(points):
        middle = (y0 + y1) / 2
        path += f" C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"
    return path


def draw():
    """The picture, as the text of an SVG file."""
    floor = floors()
    top, taken = max(floor.values()), []
    graph = {r: u for r, u in imports(floor).items() if floor[r] < top}

    def y(number):
        return 10 + (top - number) * (HEIGHT + GAP)

    lines = [
        f'<path d="{arrow(*pair, floor, y, taken)}" class="arrow"/>'
        for pair in sorted(
            reduced(graph), key=lambda p: (floor[p[0]], *map(ROOMS.get, p))
        )
    ]
    for room, number in floor.items():
        share, role = ROOMS[room]
        name = room if room.endswith(".py") else f"{room}/"
        x, up = share * WIDTH, y(number)
        lines += [
            f'<rect x="{x - BOX / 2:.0f}" y="{up}" width="{BOX}" '
            f'height="{HEIGHT}" rx="6"/>',
            f'<text x="{x:.0f}" y="{up + 22}" class="name">{name}</text>',
            f'<text x="{x:.0f}" y="{up + 41}">{role}</text>',
        ]
    lines += [
        f'<text x="12" y="{y(n) + HEIGHT / 2 + 5:.0f}" class="floor">{n}</text>'
        for n in range(top + 1)
    ]
    return f"""<svg xmlns="http://www.w3.org/2000/svg" \
viewBox="0 0 {WIDTH} {y(0) + HEIGHT + 10}" font-family="sans-serif" font-size="12.5">
<style>
rect {{ fill: #eef3fa; stroke: #49698f; }} text {{ text-anchor: middle; fill: #333; }}
.name {{ font-weight: bold; font-size: 16px; fill: #123; }} .floor {{ fill: #888; }}
.arrow {{ fill: none; stroke: #7a8ba0; stroke-width: 1.6; marker-end: url(#head); }}
</style>
<defs><marker id="head" markerWidth="8" markerHeight="8" refX="5" refY="4" \
orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#7a8ba0"/></marker></defs>
<rect width="100%" height="100%" style="fill: white; stroke: none"/>
{chr(10).join(lines)}
</svg>
"""


if __name__ == "__main__":
    (ROOT / "docs/floors.svg").write_text(draw())
