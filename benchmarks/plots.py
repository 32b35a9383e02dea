"""Lines of measured points, one a implementation, against the number that ends their case ("batch 64")."""

from pathlib import Path

from runner import Point


def save_lines(path: Path, points: list[Point], x_label: str, title: str, y_label: str = "milliseconds") -> None:
    """Both axes logarithmic, of times, or of memory if y_label is "MiB"; nothing is written without points."""
    if not points:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in dict.fromkeys(p.implementation for p in points):
        mine = sorted((int(p.case.split()[-1]), p) for p in points if p.implementation == name)
        values = [p.extra_mebibytes if y_label == "MiB" else p.milliseconds for _, p in mine]
        axes.plot([x for x, _ in mine], values, marker="o", label=name)
    floors = sorted({(int(p.case.split()[-1]), p.floor_milliseconds) for p in points if p.floor_milliseconds})
    if floors and y_label == "milliseconds":
        lowest = {x: min(y for other, y in floors if other == x) for x, _ in floors}
        axes.plot(list(lowest), list(lowest.values()), linestyle=":", color="black", label="floor")
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
