"""The report of a run as a page that needs nothing else."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor, nn

from lightning_prune.report import HTML_NAME
from lightning_prune.report import html as page
from lightning_prune.report.figures import _positions
from tests.lit import QUIET, LitNet
from tests.reports import Page, Seen, macs, run, whole_run

pytestmark = QUIET


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    return whole_run(tmp_path_factory.mktemp("whole"))


def test_the_page_needs_nothing_else_and_its_images_decode(whole: tuple[Path, Seen]) -> None:
    text = (whole[0] / HTML_NAME).read_text(encoding="utf-8")
    found = Page(whole[0] / HTML_NAME)
    assert not {"script", "link", "iframe", "object", "embed", "svg"} & set(found.tags)
    assert "://" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert len(found.links) == 4  # two figures, for light and dark
    pictures = []
    for link in found.links:
        kind, data = link.split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.load()
            pictures.append(image.copy())
    assert [picture.size for picture in pictures] == [(900, 600)] * 2 + [(900, 360)] * 2
    assert all(len(picture.getcolors(1 << 20)) > 10 for picture in pictures)  # something is drawn
    assert len(text) < 300_000


def test_the_page_shows_the_numbers(whole: tuple[Path, Seen]) -> None:
    path, seen = whole
    texts = set(Page(path / HTML_NAME).texts)
    numbers = [f"{macs(*w) / macs(16, 32):.1%}" for w in seen.widths[1:3]] + [f"{macs(16, 32):,}", "met", "val_loss"]
    numbers += [f"{loss:.4g}" for loss in (*seen.losses[:3], seen.losses[-1])]
    assert set(numbers) <= texts
    assert {"conv1_(0, 16)_out_2_in_2", "conv1, norm, conv2", "model output"} <= texts


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)<\\script><img src=x onerror='$b$'>&amp"

    class Evil(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(evil, nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.get_submodule(evil)(x))

        def validation_step(self, batch: Any, index: int) -> None:
            self.log(evil, 1.0)

    Evil.__name__ = "<b>Evil</b>"
    run(tmp_path, model=Evil(), divisor=1, ignore="conv2")
    found, plain = Page(tmp_path / HTML_NAME), Page(tmp_path / HTML_NAME)
    assert not {"script", "b"} & set(found.tags)
    assert found.tags.count("img") == 2
    assert not [value for value in found.values if value.startswith("on")]
    assert "Pruning report: <b>Evil</b>" in plain.texts
    assert evil in plain.texts
    assert any(text.startswith(evil + "_(0, 3)") for text in plain.texts)


def test_without_matplotlib_there_are_no_figures_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "can_draw", lambda: False)
    run(tmp_path)
    found = Page(tmp_path / HTML_NAME)
    assert not found.links
    assert [text for text in found.texts if "matplotlib" in text] == [
        "The figures are missing, as matplotlib is: pip install 'lightning-prune[plots]'."
    ]


def test_a_second_fit_is_drawn_behind_the_first() -> None:
    readings = [{"after_steps": k, "global_step": s} for k, s in ((0, 3), (1, 6), (1, 9), (1, 3), (1, 6))]
    document = {"readings": readings, "steps": [{"global_step": 3}]}
    assert _positions(document) == ([3, 6, 9, 12, 15], [3])
