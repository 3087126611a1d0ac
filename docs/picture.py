"""Draw docs/efficientface.png, the README's picture: the four stages from faces to a device.

``python -m docs.picture``, with what ``make setup`` installs. Nothing in it is typed: faces and
distribution are those of ``training.prepare synthetic``, files and agreement come from a committed
export, and box and label are the bundled model's, on NASA's portrait of Eileen Collins (public
domain, as scikit-image ships it).
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from skimage import data

import efficientface_deploy as ef
from training.datasets.face_renderer import LABELS, render_face

ROOT = Path(__file__).resolve().parent.parent
EXPORT = ROOT / "benchmarks/results/export-2026-11-28/report.json"
PICTURE = ROOT / "docs/efficientface.png"

INK, SOFT, LINE, BLUE, YELLOW = "#1d2733", "#5d6b7a", "#d5dce3", "#2f6fb5", "#ffd400"
STAGES = (
    ("Faces", "a data set of yours or a public one,\nor the detector's, cut alike"),
    ("Train", "a large teacher's distributions over\nall labels teach a network of 1.28 M"),
    ("Export", "ONNX and TensorRT; each file has\nto answer as PyTorch does"),
    ("Device", "one small runtime:\nef.load() and a label"),
)
NEXT = "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
BLENDED = 15  # a synthetic face between two expressions


def main() -> None:
    """Draw the four cards from left to right."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK})
    figure = plt.figure(figsize=(16, 5.6), dpi=110, facecolor="white")
    width, gap, edge = 0.225, 0.0195, 0.021
    for number, (draw, (title, text)) in enumerate(
        zip((draw_faces, draw_distribution, draw_files, draw_photograph), STAGES, strict=True)
    ):
        left = edge + number * (width + gap)
        card = FancyBboxPatch(
            (left + 0.004, 0.05),
            width - 0.008,
            0.9,
            boxstyle="round,pad=0,rounding_size=0.012",
            facecolor="#f7f9fb",
            edgecolor=LINE,
            transform=figure.transFigure,
            zorder=-1,  # below the axes, which are drawn on it
        )
        figure.add_artist(card)
        figure.text(left + 0.018, 0.862, f"{number + 1}  {title}", size=19, weight="bold")
        figure.text(left + 0.018, 0.185, text, size=11.5, color=SOFT, linespacing=1.5, va="top")
        axes = figure.add_axes((left + 0.018, 0.225, width - 0.036, 0.6))
        draw(axes)
        axes.axis("off")
        if number:
            figure.text(left - gap / 2, 0.5, NEXT, size=30, color=BLUE, ha="center", va="center")
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(256).save(PICTURE, optimize=True)  # a third in bytes
    print(f"saved {PICTURE}")


def draw_faces(axes: Axes) -> None:
    """Nine faces of the synthetic set."""
    side = 100
    axes.set(xlim=(0, 3.12 * side), ylim=(3.12 * side, 0), aspect="equal")
    for index in range(9):
        top, left = (1.06 * side * place for place in divmod(index, 3))
        face = render_face(seed=0, index=index, size=2 * side).image
        axes.imshow(face, extent=(left, left + side, top + side, top))


def draw_distribution(axes: Axes) -> None:
    """A face with its distribution over the labels."""
    face = render_face(seed=0, index=BLENDED, size=200)
    axes.set(xlim=(0, 100), ylim=(100, 0))
    inset = axes.inset_axes((0.0, 0.58, 0.42, 0.42))
    inset.imshow(face.image)
    inset.axis("off")
    axes.text(47, 14, "not one label,", size=13)
    axes.text(47, 24, "a distribution:", size=13)
    for row, (label, share) in enumerate(zip(LABELS, face.distribution, strict=True)):
        y = 55 + 6.9 * row
        axes.text(33, y, label, size=11, ha="right", va="center", color=SOFT)
        axes.add_patch(Rectangle((36, y - 2.4), max(0.5, 62 * float(share)), 4.8, color=BLUE))


def draw_files(axes: Axes) -> None:
    """The ONNX files of a committed export: megabytes, and the share with PyTorch's label."""
    report = json.loads(EXPORT.read_text(encoding="utf-8"))
    axes.set(xlim=(0, 100), ylim=(100, 0))
    for x, name in ((58, "MB"), (100, "as PyTorch")):
        axes.text(x, 4, name, size=11, color=SOFT, ha="right")
    order = ("fp32-cpu", "fp16-cpu", "int8-cpu", "fp32-gpu", "fp16-gpu", "int8-gpu")
    files = {entry["file"]: entry for entry in report["artifacts"]}
    for row, name in enumerate(order):
        entry = files[f"efficientface-{name}.onnx"]
        y = 17 + 14.5 * row
        axes.text(0, y, name.replace("-", " for ").upper().replace("FOR", "for"), size=12)
        axes.text(58, y, f"{entry['bytes'] / 1e6:.1f}", size=12, ha="right")
        agreement = 100 * entry["verification"]["agreement"]
        axes.text(100, y, f"{agreement:.1f} %", size=12, ha="right")
        axes.plot((0, 100), (y + 5, y + 5), color=LINE, linewidth=0.8)


def draw_photograph(axes: Axes) -> None:
    """The photograph with what the bundled model says of its face."""
    photograph = data.astronaut()
    with ef.load() as predictor:
        faces = predictor.predict_faces(photograph, ef.open_detector("centerface"))
    axes.imshow(photograph[:400, 30:430], extent=(30, 430, 400, 0))
    for found in faces:
        left, top, right, bottom = found.face.box
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, ec=YELLOW, lw=3)
        )
        text = f"{found.prediction.label} {found.prediction.confidence:.2f}"
        box = {"facecolor": YELLOW, "edgecolor": YELLOW, "pad": 3}
        axes.text(left, top - 8, text, size=12, weight="bold", va="bottom", bbox=box)


if __name__ == "__main__":
    main()
